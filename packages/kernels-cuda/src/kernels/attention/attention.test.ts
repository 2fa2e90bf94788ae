import { Random, type WidePrecision } from '@moe/core'
import { afterEach, describe, expect, test } from 'vitest'
import { assertNear, exact, integers, onCpu, onCuda, output } from '../../test-against-cpu.ts'
import { productVariants, reverseOrder, unavailable } from '../../test-backend.ts'

interface Size {
  readonly name: string
  readonly B: number
  readonly T: number
  readonly S: number
  readonly H: number
  readonly G: number
  readonly Dk: number
  readonly Dv: number
  readonly causal: boolean
  readonly lengths?: readonly number[]
}

// Several tiles of queries and of keys in every engine, and heads that fill its tiles or only a part of them.
const sizes: readonly Size[] = [
  { name: 'MLA heads', B: 1, T: 150, S: 150, H: 2, G: 2, Dk: 192, Dv: 128, causal: true },
  { name: 'MLA heads, shared', B: 1, T: 70, S: 330, H: 2, G: 1, Dk: 192, Dv: 128, causal: true, lengths: [300] },
  { name: 'MLA heads, tiles in all stages again', B: 1, T: 140, S: 660, H: 1, G: 1, Dk: 192, Dv: 128, causal: true },
  {
    name: 'a first query that misses one key of a tile',
    B: 1,
    T: 10,
    S: 136,
    H: 1,
    G: 1,
    Dk: 64,
    Dv: 64,
    causal: true,
  },
  { name: 'shared key heads', B: 1, T: 70, S: 150, H: 4, G: 2, Dk: 100, Dv: 128, causal: true },
  { name: 'lengths', B: 3, T: 70, S: 100, H: 1, G: 1, Dk: 64, Dv: 50, causal: true, lengths: [100, 33, 0] },
  { name: 'lengths, not causal', B: 2, T: 3, S: 100, H: 1, G: 1, Dk: 21, Dv: 64, causal: false, lengths: [64, 97] },
  { name: 'heads that nearly fill a tile', B: 1, T: 70, S: 70, H: 2, G: 2, Dk: 60, Dv: 60, causal: true },
  { name: 'heads too large for bf16', B: 1, T: 40, S: 40, H: 1, G: 1, Dk: 200, Dv: 250, causal: true },
  { name: 'several tiles of keys', B: 1, T: 200, S: 400, H: 2, G: 1, Dk: 64, Dv: 64, causal: true, lengths: [390] },
  { name: 'many more queries than keys', B: 1, T: 140, S: 6, H: 1, G: 1, Dk: 16, Dv: 16, causal: true },
]

const room: { readonly [P in WidePrecision]: number } = { f32: 5e-6, bf16: 2e-2 }

afterEach(() => {
  if (!unavailable) reverseOrder(false)
})

describe.skipIf(unavailable).each(productVariants)('attention, $precision, wgmma $wgmma', ({ precision, wgmma }) => {
  test.each(sizes)('$name', async ({ B, T, S, H, G, Dk, Dv, causal, lengths }) => {
    const random = new Random(T)
    const [q, k, v] = [exact(random, B, T, H, Dk), exact(random, B, S, G, Dk), exact(random, B, S, G, Dv)]
    const ends = lengths ? [integers(...lengths)] : []
    const attrs = { causal, scale: Dk ** -0.5, precision }
    const outputs = [output(B, T, H, Dv), output(B, H, T)]
    const expected = await onCpu('attention', [q, k, v, ...ends], attrs, outputs)
    // Keys and values behind the end of a sequence do not matter.
    lengths?.forEach((length, b) => {
      for (const { data, shape } of [k, v]) {
        const size = shape[1] * shape[2] * shape[3]
        ;(data as Float32Array).fill(Number.NaN, b * size + length * shape[2] * shape[3], (b + 1) * size)
      }
    })
    const got = await onCuda('attention', [q, k, v, ...ends], attrs, outputs, { wgmma })
    got.forEach((x, i) => {
      assertNear(['out', 'lse'][i], x, expected[i], room[precision], outputs[i].shape)
    })

    const dout = exact(random, B, T, H, Dv)
    const saved = expected.map((x, i) => ({ data: Float32Array.from(x), shape: outputs[i].shape }))
    const gradients = [q, k, v].map(x => output(...x.shape))
    const run = () => onCuda('attentionBackward', [q, k, v, ...saved, dout, ...ends], attrs, gradients, { wgmma })
    const backward = await run()
    if (wgmma) {
      reverseOrder(true)
      expect(await run()).toEqual(backward)
      reverseOrder(false)
    }
    for (const x of [k, v])
      (x.data as Float32Array).forEach((value, i, all) => {
        if (Number.isNaN(value)) all[i] = 1
      })
    const wanted = await onCpu('attentionBackward', [q, k, v, ...saved, dout, ...ends], attrs, gradients)
    backward.forEach((x, i) => {
      assertNear(['dq', 'dk', 'dv'][i], x, wanted[i], room[precision], gradients[i].shape)
    })
  })
})
