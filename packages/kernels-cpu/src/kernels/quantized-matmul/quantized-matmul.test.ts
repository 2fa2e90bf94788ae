import { fromBf16, fromF8e4m3, Random, toBf16, type WeightFormat, type WidePrecision } from '@moe/core'
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

/** Few and many rows, whole and partial registers, and blocks that dot products support or that are decoded first. */
const sizes: readonly Size[] = [
  { offsets: [0, 1], rows: 1, n: 67, k: 512, block: [1, 128] },
  { offsets: [0, 1, 1, 2], rows: 2, n: 33, k: 389, block: [1, 32] },
  { offsets: [0, 3, 3, 8, 10], rows: 11, n: 21, k: 257, block: [4, 128] },
  { offsets: [0, 8], rows: 8, n: 13, k: 200, block: [2, 64] },
  { offsets: [0, 5], rows: 5, n: 9, k: 63, block: [1, 6] },
  { offsets: [0, 9, 40], rows: 40, n: 150, k: 130, block: [128, 128] },
  { offsets: [0, 9, 10], rows: 10, n: 700, k: 301, block: [128, 96] },
]

/** Returns random codes and scales, and the values that they represent. */
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

/** Computes x W^T or x W in f64: `inner` elements of x give `outer` elements of y. */
function expected(size: Size, x: Float32Array, value: ReturnType<typeof stored>['value'], transposeW = true) {
  const { offsets, rows } = size
  const [inner, outer] = transposeW ? [size.k, size.n] : [size.n, size.k]
  const weight = (e: number, from: number, to: number) => (transposeW ? value(e, to, from) : value(e, from, to))
  const y = new Float64Array(rows * outer)
  const total = new Float64Array(rows * outer)
  /** Largest element of x times the sum of the weights' magnitudes. */
  const reach = new Float64Array(rows * outer)
  for (let e = 0; e + 1 < offsets.length; e++) {
    for (let i = offsets[e]; i < offsets[e + 1]; i++) {
      const largest = Math.max(...x.subarray(i * inner, (i + 1) * inner).map(Math.abs))
      for (let j = 0; j < outer; j++) {
        for (let t = 0; t < inner; t++) {
          const factor = weight(e, t, j)
          const term = x[i * inner + t] * factor
          y[i * outer + j] += term
          total[i * outer + j] += Math.abs(term)
          reach[i * outer + j] += largest * Math.abs(factor)
        }
      }
    }
  }
  return { y, size: total, reach }
}

async function product(
  format: WeightFormat,
  size: Size,
  x: Float32Array,
  weight: ReturnType<typeof stored>,
  options: object,
  precision: WidePrecision = 'f32',
  transposeW = true,
) {
  const backend = await testBackend(options)
  const { offsets, rows, n, k, block } = size
  const dtype = ({ bf16: 'bf16', fp8: 'f8e4m3', int8: 'u8', int4: 'u8' } as const)[format]
  const decode = { bf16: fromBf16, fp8: fromF8e4m3, int8: Number, int4: Number }[format]
  const inputs = [
    { data: x, shape: [rows, transposeW ? k : n] },
    { data: weight.codes.map(decode), shape: [offsets.length - 1, n, weight.width], dtype },
    { data: offsets, shape: [offsets.length], dtype: 'i32' as const },
    ...(format === 'bf16' ? [] : [{ data: weight.scales, shape: weight.scaleShape }]),
  ]
  const attrs = { format, block, columns: k, transposeW, precision } as const
  const [y] = await runOp(backend, 'quantizedGroupedMatmul', inputs, attrs, [
    { shape: [rows, transposeW ? n : k], dtype: 'f32' },
  ])
  backend.dispose()
  return y
}

describe.each(await availableIsas())('x W^T with quantized weights on %s', isa => {
  test.each(formats)(
    '%s: every size is within rounding errors, with equal bits on one and two threads',
    async format => {
      for (const size of sizes) {
        const x = Float32Array.from(new Random(size.k).normal(size.rows * size.k))
        const weight = stored(format, size)
        const exact = expected(size, x, weight.value)
        const one = await product(format, size, x, weight, { isa, threads: 1 })
        const two = await product(format, size, x, weight, { isa, threads: 2 })
        expect(two, JSON.stringify(size)).toEqual(one)
        // A chain of k additions; quantized x is rounded to 2^-24 of its largest element.
        const rounding = format === 'int8' || format === 'int4' ? 2 ** -24 : 0
        for (let i = 0; i < one.length; i++) {
          const bound = 2 ** -24 * (8 + size.k / 8) * exact.size[i] + rounding * exact.reach[i]
          expect(Math.abs(one[i] - exact.y[i]), `${JSON.stringify(size)} ${i}`).toBeLessThanOrEqual(bound)
        }
      }
    },
  )
})

describe.each(await availableIsas())('x W with quantized weights on %s', isa => {
  test.each(formats)(
    '%s: every size is within rounding errors, with equal bits on one and two threads',
    async format => {
      for (const size of sizes) {
        const x = Float32Array.from(new Random(size.n).normal(size.rows * size.n))
        const weight = stored(format, size)
        const exact = expected(size, x, weight.value, false)
        const one = await product(format, size, x, weight, { isa, threads: 1 }, 'f32', false)
        const two = await product(format, size, x, weight, { isa, threads: 2 }, 'f32', false)
        expect(two, JSON.stringify(size)).toEqual(one)
        for (let i = 0; i < one.length; i++) {
          const bound = 2 ** -24 * (8 + size.n / 8) * exact.size[i]
          expect(Math.abs(one[i] - exact.y[i]), `${JSON.stringify(size)} ${i}`).toBeLessThanOrEqual(bound)
        }
      }
    },
  )
})

describe.each(await availableIsas())('x quantized to integers on %s', isa => {
  const size: Size = { offsets: [0, 3], rows: 3, n: 5, k: 256, block: [1, 128] }

  describe.each(['f32', 'bf16'] as const)('precision %s', precision => {
    const rounding = precision === 'f32' ? 2 ** -22 : 2 ** -16

    test.each(['int8', 'int4'] as const)(
      '%s: NaN, infinities and tiny numbers only affect their own row',
      async format => {
        const weight = stored(format, size)
        const x = Float32Array.from(new Random(1).normal(size.rows * size.k))
        x[200] = Number.NaN
        x[size.k + 3] = Number.POSITIVE_INFINITY
        for (let i = 0; i < 128; i++) x[2 * size.k + i] *= 1e-20
        const y = await product(format, size, x, weight, { isa }, precision)
        expect([...y.subarray(0, 2 * size.n)].some(Number.isFinite)).toBe(false)
        const exact = expected(size, x, weight.value)
        for (let i = 2 * size.n; i < y.length; i++) {
          expect(Math.abs(y[i] - exact.y[i])).toBeLessThan(rounding * exact.reach[i])
        }
        const zeros = await product(format, size, new Float32Array(x.length), weight, { isa }, precision)
        expect([...zeros].every(value => value === 0)).toBe(true)
      },
    )
  })

  test('each block of x has its own scale, so that a large block does not reduce the accuracy of a small one', async () => {
    const weight = stored('int8', size)
    const x = new Float32Array(size.rows * size.k)
    for (let i = 0; i < 128; i++) x[128 + i] = (1 + i) * 1e-6
    const alone = await product('int8', size, x, weight, { isa })
    x[0] = 1e6
    const combined = await product('int8', size, x, weight, { isa })
    for (let j = 0; j < size.n; j++) {
      const large = x[0] * weight.value(0, j, 0)
      expect(Math.abs(combined[j] - large - alone[j])).toBeLessThanOrEqual(2 ** -22 * Math.abs(large))
      expect(alone[j]).not.toBe(0)
    }
  })
})
