import {
  quantizedGroupedMatmul,
  quantizedMatmul,
  Random,
  type Tensor,
  type WeightFormat,
  type WidePrecision,
  withPrecision,
} from '@moe/core'
import { type HostInput, tolerances } from '@moe/core/testing'
import { describe, expect, onTestFinished, test } from 'vitest'
import { integers, onCuda, output } from '../../test-against-cpu.ts'
import { unavailable } from '../../test-backend.ts'
import { compareWithReference, normal } from '../../test-compare-with-reference.ts'
import { limits } from './quantized-matmul.ts'

interface Size {
  readonly name: string
  /** The ends of the experts' rows; without them, the product is dense. */
  readonly offsets?: readonly number[]
  readonly m: number
  readonly n: number
  readonly k: number
  readonly block: readonly [rows: number, columns: number]
  readonly chunkBytes?: number
  /** Whether the kernels depend on the precision. */
  readonly rounds?: boolean
}

const dense: readonly Size[] = [
  { name: 'a row, several rounds of a block', m: 1, n: 23, k: 4488, block: [5, 136] },
  { name: 'a row, odd sizes', m: 1, n: 9, k: 2051, block: [3, 130] },
  { name: 'three rows, runs of 8', m: 3, n: 21, k: 2312, block: [1, 8] },
  { name: 'eight rows, runs of 8', m: 8, n: 21, k: 2312, block: [128, 128] },
  { name: 'five rows, odd sizes', m: 5, n: 13, k: 1031, block: [4, 6] },
  { name: 'two rows, runs of 32', rounds: true, m: 2, n: 45, k: 2080, block: [1, 32] },
  { name: 'eight rows, runs of 32', rounds: true, m: 8, n: 45, k: 2080, block: [16, 128] },
  { name: 'chunks of columns', rounds: true, m: 20, n: 600, k: 72, block: [100, 24], chunkBytes: 1 },
  { name: 'chunks of columns, odd sizes', rounds: true, m: 70, n: 520, k: 71, block: [7, 10], chunkBytes: 1 },
]

/** Returns the offsets of experts with these numbers of rows. */
function ends(...rows: number[]): number[] {
  const offsets = [0]
  for (const count of rows) offsets.push(offsets[offsets.length - 1] + count)
  return offsets
}

const grouped: readonly Size[] = [
  {
    name: 'more experts than a warp has lanes, most without rows',
    offsets: ends(...Array.from({ length: 70 }, (_, e) => [0, 0, 1, 0, 0, 3, 0][e % 7])),
    m: 41,
    n: 10,
    k: 72,
    block: [4, 24],
  },
  { name: 'a row or so each, odd sizes', offsets: ends(0, 1, 0, 2, 1, 0), m: 5, n: 11, k: 77, block: [2, 8] },
  {
    name: 'few rows, runs of 32',
    rounds: true,
    offsets: ends(0, 17, 0, 1, 8),
    m: 29,
    n: 19,
    k: 1120,
    block: [128, 32],
  },
  { name: 'few rows, runs of 8', offsets: ends(9, 0, 4, 1), m: 17, n: 10, k: 136, block: [1, 8] },
  {
    name: 'chunks of experts',
    rounds: true,
    offsets: ends(0, 30, 0, 70, 5, 0, 20),
    m: 140,
    n: 30,
    k: 64,
    block: [8, 16],
    chunkBytes: 8000,
  },
  {
    name: 'an expert at a time, odd sizes',
    rounds: true,
    offsets: ends(50, 0, 1, 0),
    m: 60,
    n: 33,
    k: 45,
    block: [9, 4],
    chunkBytes: 1,
  },
  { name: 'no expert has rows', rounds: true, offsets: ends(0, 0), m: 20, n: 33, k: 40, block: [1, 8] },
]

/** Returns stored weights with a magnitude of about 1, and their scales. */
function stored(format: WeightFormat, { offsets, n, k, block }: Size): HostInput[] {
  const random = new Random(n + k)
  const lead = offsets === undefined ? [] : [offsets.length - 1]
  const input = (dtype: HostInput['dtype'], shape: number[], value: (x: number) => number) => {
    const size = shape.reduce((product, length) => product * length, 1)
    return { data: Float32Array.from(random.uniform(size), value), shape, dtype }
  }
  const scale = (size: number) => {
    const shape = [...lead, Math.ceil(n / block[0]), Math.ceil(k / block[1])]
    return input('f32', shape, x => (0.5 + x) * size)
  }
  const code = (x: number) => Math.floor(x * 256)
  if (format === 'bf16') return [input('bf16', [...lead, n, k], x => 2 * x - 1)]
  if (format === 'fp8') return [input('f8e4m3', [...lead, n, k], x => 800 * x - 400), scale(1 / 400)]
  if (format === 'int8') return [input('u8', [...lead, n, k], code), scale(1 / 128)]
  return [input('u8', [...lead, n, Math.ceil(k / 2)], code), scale(1 / 8)]
}

function useChunks(bytes = limits.chunkBytes) {
  const usual = limits.chunkBytes
  limits.chunkBytes = bytes
  onTestFinished(() => {
    limits.chunkBytes = usual
  })
}

/** Checks the forward pass and the gradient of x. */
async function check(format: WeightFormat, precision: WidePrecision, size: Size, x = normal([size.m, size.k])) {
  const { offsets, n, k, block, chunkBytes } = size
  useChunks(chunkBytes)
  const shape = offsets === undefined ? [n, k] : [offsets.length - 1, n, k]
  const inputs = [x, ...stored(format, size), ...(offsets === undefined ? [] : [integers(...offsets)])]
  const product = (x: Tensor, q: Tensor, ...rest: Tensor[]) => {
    const scale = format === 'bf16' ? null : rest[0]
    const weight = { format, block, shape, q, scale }
    return offsets === undefined ? quantizedMatmul(x, weight) : quantizedGroupedMatmul(x, weight, rest[rest.length - 1])
  }
  await compareWithReference(
    inputs,
    (x, q, ...rest) => [withPrecision(precision, () => product(x, q, ...rest)).mul(0.1)],
    precision === 'f32' ? tolerances.sum : { relative: 1e-2, absolute: 0.03 },
  )
}

describe.skipIf(unavailable).each(['bf16', 'fp8', 'int8', 'int4'] as const)('products with %s weights', format => {
  describe.each(['f32', 'bf16'] as const)('%s', precision => {
    const isTested = (size: Size) => precision === 'f32' || size.rounds === true
    test.each(dense.filter(isTested))('$name', size => check(format, precision, size))
    test.each(grouped.filter(isTested))('experts: $name', size => check(format, precision, size))
  })

  test('infinities, NaN and large numbers affect only their rows', async () => {
    const [m, k] = [6, 96]
    const x = normal([m, k])
    const { NaN: nan, POSITIVE_INFINITY: high } = Number
    ;[nan, high, -high, 3e35].forEach((value, row) => {
      ;(x.data as Float32Array)[row * k + row * 17] = value
    })
    await check(format, 'f32', { name: '', m, n: 20, k, block: [4, 32] }, x)
  })

  test.each(grouped)('weights of experts without rows are not read: $name', async size => {
    const { m, n, k, block, chunkBytes, offsets = [] } = size
    useChunks(chunkBytes)
    const x = normal([m, k], 0.1)
    for (const precision of ['f32', 'bf16'] as const) {
      const [q, ...scale] = stored(format, size)
      const product = async () => {
        const inputs = [x, q, integers(...offsets), ...scale]
        return (
          await onCuda('quantizedGroupedMatmul', inputs, { format, block, columns: k, transposeW: true, precision }, [
            output(m, n),
          ])
        )[0]
      }
      const expected = await product()
      const floats = (format === 'bf16' ? q : scale[0]).data as Float32Array
      const own = floats.length / (offsets.length - 1)
      offsets.slice(1).forEach((end, e) => {
        if (end === offsets[e]) floats.fill(Number.NaN, e * own, (e + 1) * own)
      })
      expect(await product()).toEqual(expected)
    }
  })
})
