/**
 * @file Cases of products with quantized weights: every format, few and many rows, and sizes that fill neither vectors
 * nor blocks.
 */
import { fromF8e4m3 } from '../../dtype.ts'
import type { WeightFormat } from '../../ops.ts'
import { type CaseInput, f32, given, type OpCase, opCase, uniform } from '../case.ts'
import { tolerances } from '../compare.ts'

const sum = { tolerance: tolerances.sum }
/** Both factors are rounded to bf16, with an error of 2^-8 each, and their products are of size about 1. */
const rough = { tolerance: { relative: 2e-2, absolute: 0.2 }, gradient: false }

const formats: readonly WeightFormat[] = ['bf16', 'fp8', 'int8', 'int4']

/**
 * Quantized weights whose values are of size about 1. All codes occur, including those that rounding never produces.
 */
function stored(format: WeightFormat, block: readonly [number, number], lead: number[], rows: number, columns: number) {
  const scales = (low: number, high: number) =>
    uniform(low, high, ...lead, Math.ceil(rows / block[0]), Math.ceil(columns / block[1]))
  const bytes = (width: number): CaseInput => ({
    shape: [...lead, rows, width],
    dtype: 'u8',
    random: 'integer',
    low: 0,
    high: 256,
  })
  switch (format) {
    case 'bf16':
      return { q: { ...f32(...lead, rows, columns), dtype: 'bf16' } satisfies CaseInput, scale: [] }
    case 'fp8':
      return {
        q: { ...uniform(-448, 448, ...lead, rows, columns), dtype: 'f8e4m3' } satisfies CaseInput,
        scale: [scales(0.002, 0.006)],
      }
    case 'int8':
      return { q: bytes(columns), scale: [scales(0.005, 0.02)] }
    case 'int4':
      return { q: bytes(Math.ceil(columns / 2)), scale: [scales(0.1, 0.3)] }
  }
}

type Size = readonly [
  name: string,
  m: number,
  n: number,
  k: number,
  blocks: Readonly<Record<'fp8' | 'int8' | 'int4', readonly [number, number]>>,
]
const small = { fp8: [4, 8], int8: [1, 8], int4: [1, 6] } as const
const usual = { fp8: [128, 128], int8: [1, 128], int4: [1, 32] } as const
const sizes: readonly Size[] = [
  ['one row', 1, 130, 384, usual],
  ['one row, odd sizes', 1, 37, 131, small],
  ['a column', 2, 5, 1, small],
  ['no columns', 2, 3, 0, small],
  ['no rows', 0, 5, 16, usual],
  ['three rows', 3, 70, 200, usual],
  ['eight rows, blocks of several rows', 8, 19, 77, { fp8: [3, 5], int8: [7, 33], int4: [2, 64] }],
  ['many rows', 41, 150, 260, usual],
]

const productCases = formats.flatMap(format =>
  sizes.flatMap(([name, m, n, k, blocks]) => {
    const block = format === 'bf16' ? ([1, 1] as const) : blocks[format]
    const { q, scale } = stored(format, block, [], n, k)
    const one = (precision: 'f32' | 'bf16', transposeW: boolean) =>
      opCase(
        'quantizedMatmul',
        `${format}, ${name}, ${transposeW ? '' : 'untransposed, '}${precision}`,
        [f32(m, transposeW ? k : n), q, ...scale],
        { format, block, columns: k, transposeW, precision },
        precision === 'f32' ? sum : rough,
      )
    const inBf16 = name === 'one row' || name === 'many rows'
    return [true, false].flatMap(transposeW => [one('f32', transposeW), ...(inBf16 ? [one('bf16', transposeW)] : [])])
  }),
)

const groups: ReadonlyArray<readonly [name: string, offsets: number[], m: number, n: number, k: number]> = [
  ['a row each for two of five', [0, 0, 1, 1, 2, 2], 2, 96, 128],
  ['ragged, odd sizes', [0, 3, 3, 11, 17], 17, 13, 45],
  ['rows past the last offset', [0, 2, 6], 9, 5, 16],
  ['many rows', [0, 20, 120, 200], 200, 40, 64],
]

const groupedCases = formats.flatMap(format =>
  groups.flatMap(([name, offsets, m, n, k]) =>
    [true, false].map(transposeW => {
      const block = format === 'bf16' ? ([1, 1] as const) : format === 'fp8' ? ([8, 32] as const) : usual[format]
      const { q, scale } = stored(format, block, [offsets.length - 1], n, k)
      return opCase(
        'quantizedGroupedMatmul',
        `${format}, ${name}${transposeW ? '' : ', untransposed'}`,
        [f32(m, transposeW ? k : n), q, given('i32', [offsets.length], offsets), ...scale],
        { format, block, columns: k, transposeW, precision: 'f32' },
        sum,
      )
    }),
  ),
)

export const quantizedCases: readonly OpCase[] = [
  ...productCases,
  ...groupedCases,
  opCase(
    'quantizedMatmul',
    'fp8, every code, NaN included',
    [
      given('f32', [2, 3], [1, 1, 1, -2, 0.5, 1]),
      given(
        'f8e4m3',
        [85, 3],
        Array.from({ length: 255 }, (_, code) => fromF8e4m3(code + 1)),
      ),
      uniform(0.5, 2, 1, 1),
    ],
    { format: 'fp8', block: [128, 128], columns: 3, transposeW: true, precision: 'f32' },
    { ...sum, gradient: false },
  ),
]
