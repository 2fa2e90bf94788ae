import type { WidePrecision } from '@moe/core'
import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import type { Cuda } from '../../native.ts'
import { assertNearCpu, distance, exact, onCuda, output } from '../../test-against-cpu.ts'
import { unavailable, wgmmaVariants } from '../../test-backend.ts'
import { tilesOfForm } from '../matmul-sm90a/product.ts'
import { chooseTile, countTiles } from './tiles.ts'

interface Size {
  readonly name: string
  readonly precision: WidePrecision
  readonly batch?: number
  readonly m: number
  readonly n: number
  readonly k: number
}

// The choice of a tile depends on the number of multiprocessors; these sizes are for the emulator's four.
const sizes: readonly Size[] = [
  { name: 'tiles of 128 x 128', precision: 'f32', batch: 8, m: 125, n: 127, k: 37 },
  { name: 'tiles of 64 x 64', precision: 'f32', m: 130, n: 70, k: 65 },
  { name: 'more than one band of tiles', precision: 'f32', m: 1100, n: 70, k: 5 },
  { name: 'tiles of 128 x 256', precision: 'bf16', batch: 8, m: 125, n: 251, k: 70 },
  { name: 'tiles of 128 x 128', precision: 'bf16', batch: 8, m: 125, n: 127, k: 161 },
  { name: 'tiles of 64 x 64', precision: 'bf16', m: 130, n: 70, k: 200 },
  { name: 'full tiles of 128 x 128 and a partial one', precision: 'f32', batch: 4, m: 125, n: 252, k: 20 },
  { name: 'full tiles of 128 x 256 and a partial one', precision: 'bf16', batch: 4, m: 125, n: 508, k: 40 },
  { name: 'a partial tile of 128 x 128', precision: 'bf16', batch: 8, m: 125, n: 124, k: 40 },
  { name: 'tiles of 128 x 144 where they exist', precision: 'bf16', m: 509, n: 144, k: 200 },
  { name: 'a partial tile of 128 x 144', precision: 'bf16', m: 509, n: 140, k: 70 },
  { name: 'tiles of 128 x 192', precision: 'bf16', m: 509, n: 192, k: 390 },
  { name: 'a partial tile of 128 x 192, columns not a multiple of 4', precision: 'bf16', m: 509, n: 190, k: 70 },
  { name: 'split-K', precision: 'bf16', m: 30, n: 41, k: 2101 },
  { name: 'split-K', precision: 'f32', m: 30, n: 41, k: 2101 },
]
const fewRows = ['f32', 'bf16'].flatMap(precision =>
  [1, 3, 8].flatMap(m => [
    { name: `${m} rows of b^T`, precision: precision as WidePrecision, batch: 2, m, n: 37, k: 1204 },
    { name: `${m} rows of b`, precision: precision as WidePrecision, batch: 2, m, n: 300, k: 130 },
  ]),
)
const forms = [false, true].flatMap(transposeA => [false, true].map(transposeB => ({ transposeA, transposeB })))

describe.skipIf(unavailable).each(wgmmaVariants)('matmul, wgmma %s', wgmma => {
  const options = { wgmma }
  // With wgmma, the same sizes use other tiles. f32 and few rows are not affected.
  const affected = wgmma ? sizes.filter(({ precision }) => precision === 'bf16') : [...sizes, ...fewRows]
  test.each(affected)('$name, $precision', async ({ precision, batch, m, n, k }) => {
    const random = new Random(m)
    const lead = batch === undefined ? [] : [batch]
    for (const { transposeA, transposeB } of forms) {
      const a = exact(random, ...lead, ...(transposeA ? [k, m] : [m, k]))
      const b = exact(random, ...lead, ...(transposeB ? [n, k] : [k, n]))
      const attrs = { transposeA, transposeB, precision }
      await assertNearCpu('matmul', [a, b], attrs, [output(...lead, m, n)], 2e-6, options)
    }
  })

  test('results are bitwise identical in every run', async () => {
    const random = new Random(1)
    for (const precision of ['f32', 'bf16'] as const) {
      const inputs = [exact(random, 70, 2100), exact(random, 33, 2100)]
      const attrs = { transposeA: false, transposeB: true, precision }
      const [first] = await onCuda('matmul', inputs, attrs, [output(70, 33)], options)
      const [second] = await onCuda('matmul', inputs, attrs, [output(70, 33)], options)
      expect(distance(first, second)).toBe(0)
    }
  })

  test.each(['f32', 'bf16'] as const)('NaN and infinity affect only their rows and columns, %s', async precision => {
    const [m, n, k] = [70, 70, 40]
    const a = new Float32Array(m * k).fill(1)
    const b = new Float32Array(n * k).fill(1)
    a[3 * k + 39] = Number.NaN
    b[34 * k + 1] = Number.POSITIVE_INFINITY
    const inputs = [
      { data: a, shape: [m, k] },
      { data: b, shape: [n, k] },
    ]
    const [c] = await onCuda(
      'matmul',
      inputs,
      { transposeA: false, transposeB: true, precision },
      [output(m, n)],
      options,
    )
    const expected = c.map((_, at) =>
      Math.floor(at / n) === 3 ? Number.NaN : at % n === 34 ? Number.POSITIVE_INFINITY : k,
    )
    expect(c).toEqual(expected)
  })
})

// For 4,096 tokens on an H100. A wrong choice mainly costs time because multiprocessors are idle in the last wave.
test.each([
  ['q_a_proj', 1536, '128x192'],
  ['q_b_proj', 24576, '128x256'],
  ['kv_a_proj', 576, '128x144'],
  ['kv_b_proj', 32768, '128x256'],
  ['o_proj', 7168, '128x256'],
  ['dense mlp up', 18432, '128x256'],
])('%s with %i columns uses tiles of %s on 132 multiprocessors', (_name, columns, expected) => {
  const cuda = { multiprocessors: 132 } as Cuda
  expect(chooseTile(cuda, tilesOfForm('nt'), tile => countTiles(tile, 4096, columns)).name).toBe(expected)
})
