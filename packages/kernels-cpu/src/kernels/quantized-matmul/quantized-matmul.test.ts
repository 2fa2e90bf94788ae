import { fromBf16, fromF8e4m3, Random, toBf16, type WeightFormat } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'

const formats: readonly WeightFormat[] = ['bf16', 'fp8', 'int8', 'int4']

interface Size {
  readonly offsets: readonly number[]
  readonly rows: number
  readonly n: number
  readonly k: number
  readonly block: readonly [number, number]
}

/** Few rows and many; whole and broken registers; blocks that the dot products take, and such that are decoded first. */
const sizes: readonly Size[] = [
  { offsets: [0, 1], rows: 1, n: 67, k: 512, block: [1, 128] },
  { offsets: [0, 1, 1, 2], rows: 2, n: 33, k: 389, block: [1, 32] },
  { offsets: [0, 3, 3, 8, 10], rows: 11, n: 21, k: 257, block: [4, 128] },
  { offsets: [0, 8], rows: 8, n: 13, k: 200, block: [2, 64] },
  { offsets: [0, 5], rows: 5, n: 9, k: 63, block: [1, 6] },
  { offsets: [0, 9, 40], rows: 40, n: 150, k: 130, block: [128, 128] },
]

/** Bytes as stored, and the numbers that they stand for. */
function stored(format: WeightFormat, { offsets, n, k, block }: Size) {
  const random = new Random(n * k).fork(format)
  const experts = offsets.length - 1
  const perRow = Math.ceil(k / block[1])
  const scales = random.uniform(experts * Math.ceil(n / block[0]) * perRow).map(x => 0.01 + x / 50)
  const width = format === 'int4' ? Math.ceil(k / 2) : k
  const codes = Array.from({ length: experts * n * width }, () => {
    const code = random.integer(256)
    if (format === 'bf16') return toBf16((code - 128) / 99)
    return format === 'fp8' && (code & 127) === 127 ? 0 : code
  })
  const value = (e: number, row: number, column: number) => {
    const at = (e * n + row) * width
    if (format === 'bf16') return fromBf16(codes[at + column])
    const scale =
      scales[(e * Math.ceil(n / block[0]) + Math.floor(row / block[0])) * perRow + Math.floor(column / block[1])]
    if (format === 'fp8') return fromF8e4m3(codes[at + column]) * scale
    if (format === 'int8') return (codes[at + column] - 128) * scale
    return (((codes[at + (column >> 1)] >> (4 * (column & 1))) & 15) - 8) * scale
  }
  return { codes, scales, width, scaleShape: [experts, Math.ceil(n / block[0]), perRow], value }
}

function expected({ offsets, rows, n, k }: Size, x: Float32Array, value: ReturnType<typeof stored>['value']) {
  const y = new Float64Array(rows * n)
  const size = new Float64Array(rows * n)
  for (let e = 0; e + 1 < offsets.length; e++) {
    for (let i = offsets[e]; i < offsets[e + 1]; i++) {
      for (let j = 0; j < n; j++) {
        for (let t = 0; t < k; t++) {
          const term = x[i * k + t] * value(e, j, t)
          y[i * n + j] += term
          size[i * n + j] += Math.abs(term)
        }
      }
    }
  }
  return { y, size }
}

async function product(
  format: WeightFormat,
  size: Size,
  x: Float32Array,
  weight: ReturnType<typeof stored>,
  options: object,
) {
  const backend = await testBackend(options)
  const { offsets, rows, n, k, block } = size
  const dtype = ({ bf16: 'bf16', fp8: 'f8e4m3', int8: 'u8', int4: 'u8' } as const)[format]
  const decode = { bf16: fromBf16, fp8: fromF8e4m3, int8: Number, int4: Number }[format]
  const inputs = [
    { data: x, shape: [rows, k] },
    { data: weight.codes.map(decode), shape: [offsets.length - 1, n, weight.width], dtype },
    { data: offsets, shape: [offsets.length], dtype: 'i32' as const },
    ...(format === 'bf16' ? [] : [{ data: weight.scales, shape: weight.scaleShape }]),
  ]
  const attrs = { format, block, precision: 'f32' } as const
  const [y] = await runOp(backend, 'quantizedGroupedMatmul', inputs, attrs, [{ shape: [rows, n], dtype: 'f32' }])
  backend.dispose()
  return y
}

describe.each(await availableIsas())('stored weights on %s', isa => {
  test.each(formats)(
    '%s: every size within rounding of f32 sums, the same bits on one and two threads',
    async format => {
      for (const size of sizes) {
        const x = Float32Array.from(new Random(size.k).normal(size.rows * size.k))
        const weight = stored(format, size)
        const exact = expected(size, x, weight.value)
        const one = await product(format, size, x, weight, { isa, threads: 1 })
        const two = await product(format, size, x, weight, { isa, threads: 2 })
        expect(two, JSON.stringify(size)).toEqual(one)
        // A chain of k additions of terms, of which those of the zero point (16/7 and 256/127 times as large) are taken off again.
        for (let i = 0; i < one.length; i++) {
          const bound = 2 ** -24 * 3 * (8 + size.k / 8) * exact.size[i]
          expect(Math.abs(one[i] - exact.y[i]), `${JSON.stringify(size)} ${i}`).toBeLessThanOrEqual(bound)
        }
      }
    },
  )
})
