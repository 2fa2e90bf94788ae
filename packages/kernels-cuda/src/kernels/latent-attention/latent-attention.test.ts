import { Random } from '@moe/core'
import { afterEach, describe, expect, test } from 'vitest'
import { assertNear, exact, integers, onCpu, onCuda, output } from '../../test-against-cpu.ts'
import { productVariants, reverseOrder, unavailable } from '../../test-backend.ts'
import { choice } from '../matmul/tiles.ts'

const cases = [
  { name: 'V3, split keys', B: 1, T: 1, S: 700, H: 16, C: 576, V: 512, lengths: [650] },
  { name: 'two tiles of heads', B: 2, T: 1, S: 300, H: 70, C: 96, V: 80, lengths: [300, 97] },
  { name: 'several tokens, an empty sequence', B: 3, T: 2, S: 200, H: 5, C: 48, V: 32, lengths: [2, 0, 200] },
  { name: 'several tiles per split', B: 1, T: 1, S: 640, H: 8, C: 576, V: 512, lengths: [600] },
  { name: 'several tokens of many heads', B: 2, T: 3, S: 300, H: 40, C: 160, V: 128, lengths: [257, 128] },
  { name: 'an odd number of tiles', B: 1, T: 1, S: 200, H: 3, C: 288, V: 256, lengths: [190] },
  { name: 'odd sizes', B: 1, T: 70, S: 100, H: 2, C: 21, V: 13, lengths: [100] },
  { name: 'a scale below zero', B: 1, T: 1, S: 200, H: 3, C: 96, V: 80, lengths: [190], scale: -0.1 },
  { name: 'a scale of zero', B: 1, T: 1, S: 200, H: 3, C: 96, V: 80, lengths: [190], scale: 0 },
]

const pagedCases = [
  { name: 'V3, pages of a tile', B: 1, T: 1, H: 16, C: 576, V: 512, P: 64, lengths: [650] },
  { name: 'small pages', B: 2, T: 2, H: 40, C: 160, V: 128, P: 16, lengths: [301, 97] },
  { name: 'pages of two tiles', B: 3, T: 1, H: 5, C: 288, V: 256, P: 128, lengths: [256, 0, 130] },
  { name: 'pages of three quarters of a tile', B: 2, T: 3, H: 8, C: 48, V: 32, P: 48, lengths: [200, 48] },
  { name: 'odd sizes', B: 2, T: 1, H: 3, C: 21, V: 13, P: 5, lengths: [33, 50] },
]

/** Returns a cache of shuffled pages, the first of which all sequences share, and the same rows as a contiguous cache. Unused rows are NaN in pages, otherwise 0. */
function makePages(random: Random, { B, C, P, lengths }: (typeof pagedCases)[number]) {
  const perSequence = Math.ceil(Math.max(...lengths) / P)
  const pageCount = B * perSequence + 2
  const inOrder = Array.from({ length: pageCount }, (_, n) => n)
  const order = [...inOrder.filter(n => n % 2 === 1), ...inOrder.filter(n => n % 2 === 0)]
  const pages = Array.from({ length: B * perSequence }, (_, i) => order[i % perSequence === 0 ? 0 : i + 1])
  const filled = exact(random, pageCount, P, C).data
  const cache = new Float32Array(filled.length)
  const inUse = new Uint8Array(pageCount * P)
  const contiguous = new Float32Array(B * perSequence * P * C)
  lengths.forEach((length, b) => {
    for (let s = 0; s < length; s++) {
      const row = pages[b * perSequence + Math.floor(s / P)] * P + (s % P)
      const values = Float32Array.from({ length: C }, (_, c) => filled[row * C + c])
      inUse[row] = 1
      cache.set(values, row * C)
      contiguous.set(values, (b * perSequence * P + s) * C)
    }
  })
  const paged = cache.map((x, i) => (inUse[Math.floor(i / C)] === 1 ? x : Number.NaN))
  const table = { data: Int32Array.from(pages), shape: [B, perSequence], dtype: 'i32' as const }
  return {
    table,
    contiguous: { data: contiguous, shape: [B, perSequence * P, C] },
    paged: { data: paged, shape: [pageCount, P, C] },
  }
}

afterEach(() => {
  if (!unavailable) reverseOrder(false)
})

describe.skipIf(unavailable).each(productVariants)(
  'latent attention, $precision, wgmma $wgmma',
  ({ precision, wgmma }) => {
    test.each(cases)('$name', async ({ B, T, S, H, C, V, lengths, scale = C ** -0.5 }) => {
      const random = new Random(S)
      const q = exact(random, B, T, H, C)
      const cache = exact(random, B, S, C)
      const attrs = { scale, valueDim: V, precision }
      const inputs = [q, cache, integers(...lengths)]
      const [expected] = await onCpu('latentAttention', inputs, attrs, [output(B, T, H, V)])
      // Rows after the end of a sequence are never read.
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

    test.each([12, 13])('more splits than tiles of keys are combined, %i value features', async V => {
      const random = new Random(V)
      const [B, S, H, C] = [2, 200, 3, 16]
      const inputs = [
        exact(random, B, 1, H, C),
        { ...exact(random, B, S, C), dtype: 'bf16' as const },
        integers(200, 0),
      ]
      const attrs = { scale: 0.25, valueDim: V, precision }
      const [expected] = await onCpu('latentAttention', inputs, attrs, [output(B, 1, H, V)])
      choice.parts = 14
      try {
        const [got] = await onCuda('latentAttention', inputs, attrs, [output(B, 1, H, V)], { wgmma })
        assertNear('splits', got, expected, precision === 'bf16' ? 1e-2 : 5e-6, [B, 1, H, V])
      } finally {
        choice.parts = undefined
      }
    })

    test.each(pagedCases)('paged cache: $name', async c => {
      const { B, T, H, C, V, lengths } = c
      const random = new Random(C)
      const q = exact(random, B, T, H, C)
      const { table, contiguous, paged } = makePages(random, c)
      const attrs = { scale: C ** -0.5, valueDim: V, precision }
      const used = integers(...lengths)
      const [expected] = await onCpu('latentAttention', [q, contiguous, used], attrs, [output(B, T, H, V)])
      for (const dtype of ['f32', 'bf16'] as const) {
        const stored = [q, { ...paged, dtype }, used, table]
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
