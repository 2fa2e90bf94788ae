import { Random } from '@moe/core'
import { afterEach, describe, expect, test } from 'vitest'
import { assertNear, exact, integers, onCpu, onCuda, output } from '../../test-against-cpu.ts'
import { productVariants, reverseOrder, unavailable } from '../../test-backend.ts'

const cases = [
  { name: 'V3, in parts', B: 1, T: 1, S: 700, H: 16, C: 576, V: 512, lengths: [650] },
  { name: 'two tiles of heads', B: 2, T: 1, S: 300, H: 70, C: 96, V: 80, lengths: [300, 97] },
  { name: 'several tokens, an empty sequence', B: 3, T: 2, S: 200, H: 5, C: 48, V: 32, lengths: [2, 0, 200] },
  { name: 'tiles one after another', B: 1, T: 1, S: 640, H: 8, C: 576, V: 512, lengths: [600] },
  { name: 'several tokens of many heads', B: 2, T: 3, S: 300, H: 40, C: 160, V: 128, lengths: [257, 128] },
  { name: 'an uneven number of tiles', B: 1, T: 1, S: 200, H: 3, C: 288, V: 256, lengths: [190] },
  { name: 'odd sizes', B: 1, T: 70, S: 100, H: 2, C: 21, V: 13, lengths: [100] },
]

afterEach(() => {
  if (!unavailable) reverseOrder(false)
})

describe.skipIf(unavailable).each(productVariants)(
  'latent attention, $precision, wgmma $wgmma',
  ({ precision, wgmma }) => {
    test.each(cases)('$name', async ({ B, T, S, H, C, V, lengths }) => {
      const random = new Random(S)
      const q = exact(random, B, T, H, C)
      const cache = exact(random, B, S, C)
      const attrs = { scale: C ** -0.5, valueDim: V, precision }
      const inputs = [q, cache, integers(...lengths)]
      const [expected] = await onCpu('latentAttention', inputs, attrs, [output(B, T, H, V)])
      // Rows behind the end of a sequence are never read.
      lengths.forEach((length, b) => {
        ;(cache.data as Float32Array).fill(Number.NaN, (b * S + length) * C, (b + 1) * S * C)
      })
      for (const dtype of ['f32', 'bf16'] as const) {
        const stored = [q, { ...cache, dtype }, integers(...lengths)]
        const run = () => onCuda('latentAttention', stored, attrs, [output(B, T, H, V)], { wgmma })
        const [got] = await run()
        if (wgmma) {
          reverseOrder(true)
          expect(await run()).toEqual([got])
          reverseOrder(false)
        }
        assertNear(`cache in ${dtype}`, got, expected, precision === 'bf16' ? 1e-2 : 5e-6, [B, T, H, V])
      }
    })
  },
)
