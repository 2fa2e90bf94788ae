import {
  type Backend,
  Linear,
  Module,
  namedParameters,
  type QuantizedWeight,
  quantizedGroupedMatmul,
  quantizedMatmul,
  quantizeWeights,
  Random,
  type Tensor,
  type WeightFormat,
  weightBytes,
} from '@moe/core'
import type { HostInput } from '@moe/core/testing'
import { compareWithReference } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend } from '../test-gpu.ts'
import { integers, normal } from '../test-inputs.ts'

const backend = (await testBackend()) as Backend
const formats: readonly WeightFormat[] = ['bf16', 'fp8', 'int8', 'int4']

interface Stored {
  /** Codes, and scales unless the format is bf16. */
  readonly parts: readonly HostInput[]
  weight(q: Tensor, scale: Tensor | undefined): QuantizedWeight
}

type Block = readonly [rows: number, columns: number]

/** Returns random weights with a magnitude of about 1. All integer codes occur, even those that quantization never produces. */
function storedWeight(format: WeightFormat, block: Block, shape: readonly number[]): Stored {
  const [rows, columns] = shape.slice(-2)
  const lead = shape.slice(0, -2)
  const weight = (q: Tensor, scale: Tensor | undefined) => ({ format, block, shape, q, scale: scale ?? null })
  if (format === 'bf16') return { parts: [{ ...normal(shape), dtype: 'bf16' }], weight }
  const factor = { fp8: 1, int8: 0.015, int4: 0.25 }[format]
  const spread = normal([...lead, Math.ceil(rows / block[0]), Math.ceil(columns / block[1])])
  const scale = { ...spread, data: Array.from(spread.data, x => factor * (1 + Math.abs(x))) }
  if (format === 'fp8') return { parts: [{ ...normal(shape), dtype: 'f8e4m3' }, scale], weight }
  const stored = [...lead, rows, format === 'int4' ? Math.ceil(columns / 2) : columns]
  const random = new Random(7)
  const codes = Array.from({ length: stored.reduce((product, n) => product * n, 1) }, () =>
    Math.floor(random.next() * 256),
  )
  return { parts: [{ data: codes, shape: stored, dtype: 'u8' }, scale], weight }
}

const tolerance = (k: number) => ({ relative: 5e-5, absolute: 2e-6 * Math.max(k, 10) })

describe.skipIf(backend === null)('quantizedMatmul and its gradient', () => {
  const cases: ReadonlyArray<readonly [m: number, n: number, k: number, block: Block]> = [
    [1, 130, 384, [1, 32]],
    // Few rows: up to the four that are computed together, and one more.
    [3, 37, 132, [1, 4]],
    [4, 19, 260, [3, 8]],
    [5, 64, 128, [1, 128]],
    // Rows that begin within a word, and blocks that end within a group of four columns.
    [1, 9, 1, [1, 2]],
    [2, 33, 131, [1, 6]],
    [2, 33, 130, [2, 6]],
    [66, 70, 67, [5, 10]],
    [65, 66, 68, [7, 6]],
    // Columns split into parts.
    [7, 12, 1100, [128, 128]],
    [0, 5, 8, [1, 32]],
    [2, 0, 8, [1, 32]],
    [2, 5, 0, [1, 32]],
  ]
  test.each(cases)('%i rows, %i x %i, blocks of %j', async (m, n, k, block) => {
    for (const format of formats) {
      const { parts, weight } = storedWeight(format, block, [n, k])
      const op = (x: Tensor, q: Tensor, scale?: Tensor) => [quantizedMatmul(x, weight(q, scale))]
      await compareWithReference(backend, [normal([m, k]), ...parts], op, tolerance(Math.max(n, k)))
    }
  })

  test('NaN affects only its row', async () => {
    for (const [format, dtype] of [
      ['fp8', 'f8e4m3'],
      ['bf16', 'bf16'],
    ] as const) {
      for (const k of [6, 8]) {
        const { parts, weight } = storedWeight(format, [1, 2], [5, k])
        const data = Array.from(parts[0].data)
        data[2 * k] = Number.NaN
        data[4 * k - 1] = Number.NaN
        const inputs = [normal([2, k]), { data, shape: [5, k], dtype }, ...parts.slice(1)]
        const { outputs } = await compareWithReference(backend, inputs, (x, q, scale) => [
          quantizedMatmul(x, weight(q, scale)),
        ])
        expect(Array.from(outputs[0], Number.isNaN)).toEqual([0, 1].flatMap(() => [false, false, true, true, false]))
      }
    }
  })
})

describe.skipIf(backend === null)('quantizedGroupedMatmul and its gradient', () => {
  const cases: ReadonlyArray<readonly [rows: number, n: number, k: number, block: Block, offsets: readonly number[]]> =
    [
      [17, 12, 8, [1, 8], [0, 3, 3, 17]],
      [130, 66, 20, [4, 4], [0, 0, 1, 65, 66, 130]],
      [70, 13, 45, [3, 6], [0, 20, 20, 70]],
      [16, 130, 68, [1, 32], [0, 1, 1, 2, 5, 16]],
      [9, 5, 16, [2, 6], [0, 2, 6]],
      [150, 8, 7, [1, 2], [0, 2, 6]],
      // Many experts with one row each.
      [20, 5, 12, [1, 4], Array.from({ length: 25 }, (_, i) => Math.min(i, 20))],
      [0, 8, 8, [1, 8], [0, 0]],
    ]
  test.each(cases)('%i rows, %i x %i, blocks of %j, %j', async (rows, n, k, block, offsets) => {
    for (const format of formats) {
      const { parts, weight } = storedWeight(format, block, [offsets.length - 1, n, k])
      const inputs = [normal([rows, k]), integers([...offsets]), ...parts]
      await compareWithReference(backend, inputs, (x, ends, q, scale) => [
        quantizedGroupedMatmul(x, weight(q, scale), ends),
      ])
    }
  })
})

describe.skipIf(backend === null)('memory', () => {
  class Model extends Module {
    readonly up: Linear
    constructor(backend: Backend) {
      super()
      this.up = new Linear(512, 384, { random: new Random(2), backend })
    }
  }

  // A scale of four bytes for each 128 or 32 columns.
  test.each([
    ['bf16', 2],
    ['fp8', 1 + 4 / 128 ** 2],
    ['int8', 1 + 4 / 128],
    ['int4', 0.5 + 4 / 32],
  ] as const)('a weight in %s takes %d bytes per element', async (format, bytes) => {
    const before = backend.stats().bytes
    const model = new Model(backend)
    await quantizeWeights(model, format)
    expect(backend.stats().bytes - before).toBe(512 * 384 * bytes)
    expect(weightBytes(model).bytes).toBe(512 * 384 * bytes)
    for (const { parameter } of [...namedParameters(model)]) parameter.dispose()
    expect(backend.stats().bytes).toBe(before)
  })
})
