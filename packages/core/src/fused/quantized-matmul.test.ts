import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { randn, tensor } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import type { WeightFormat } from '../ops.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { scope } from '../scope.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { assertClose, tolerances } from '../testing/compare.ts'
import { groupedMatmul } from './grouped-matmul.ts'
import {
  dequantizeWeight,
  quantizedGroupedMatmulDefinition,
  quantizedMatmulDefinition,
  quantizeWeight,
  untransposedLimits,
} from './quantized-matmul.ts'

const usual = untransposedLimits.elements
let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})
afterEach(() => {
  untransposedLimits.elements = usual
})

/** Blocks with a remainder, and an odd number of columns. */
const stored: ReadonlyArray<readonly [WeightFormat, readonly [number, number]]> = [
  ['bf16', [1, 1]],
  ['fp8', [4, 8]],
  ['int8', [1, 8]],
  ['int4', [1, 6]],
]
const [rows, columns] = [10, 45]
const needs = (input: number) => input === 0

describe.each(stored)('backward pass through a weight in %s', (format, block) => {
  // One column of blocks at a time, several, and all at once.
  test.each([1, 200, usual])('equals that of the dequantized weight, %i elements at a time', async elements => {
    untransposedLimits.elements = elements
    const weight = quantizeWeight(randn([rows, columns], new Random(1)), format, block)
    const inputs = [randn([3, columns], new Random(2)), weight.q, ...(weight.scale === null ? [] : [weight.scale])]
    const dy = randn([3, rows], new Random(3))
    const attrs = { format, block, columns, transposeW: true, precision: 'f32' } as const
    const back = quantizedMatmulDefinition.vjp
    const [found] = scope(() => noGrad(() => back?.({ inputs, outputs: [], attrs, needs }, [dy]) ?? []))
    const expected = scope(() => dy.matmul(dequantizeWeight(weight)))
    assertClose('dx', (await found?.values()) as never, await expected.values(), tolerances.exact)
  })

  test.each([1, 600, usual])(
    'of experts equals that of the dequantized weights, %i elements at a time',
    async elements => {
      untransposedLimits.elements = elements
      const weight = quantizeWeight(randn([3, rows, columns], new Random(1)), format, block)
      const offsets = tensor(Int32Array.of(0, 2, 2, 6), [4])
      const scale = weight.scale === null ? [] : [weight.scale]
      const inputs = [randn([7, columns], new Random(2)), weight.q, offsets, ...scale]
      const dy = randn([7, rows], new Random(3))
      const attrs = { format, block, columns, transposeW: true, precision: 'f32' } as const
      const back = quantizedGroupedMatmulDefinition.vjp
      const [found] = scope(() => noGrad(() => back?.({ inputs, outputs: [], attrs, needs }, [dy]) ?? []))
      const expected = scope(() => groupedMatmul(dy, dequantizeWeight(weight), offsets, { transposeW: false }))
      assertClose('dx', (await found?.values()) as never, await expected.values(), tolerances.exact)
    },
  )
})

test('a small limit reduces the peak memory of the backward pass, which leaves no handle behind', async () => {
  const weight = quantizeWeight(randn([64, 512], new Random(1)), 'int8', [1, 64])
  const inputs = [randn([2, 512], new Random(2)), weight.q, weight.scale as Tensor]
  const dy = randn([2, 64], new Random(3))
  const attrs = { format: 'int8', block: [1, 64], columns: 512, transposeW: true, precision: 'f32' } as const
  const peak = async (elements: number) => {
    untransposedLimits.elements = elements
    // A new backend, so that its peak does not include the memory that quantization needed.
    const own = referenceBackend()
    const [x, q, scale, gradient] = await Promise.all([...inputs, dy].map(input => input.to(own)))
    const { bytes, handles } = own.stats()
    const back = () => quantizedMatmulDefinition.vjp?.({ inputs: [x, q, scale], outputs: [], attrs, needs }, [gradient])
    scope(() => noGrad(back))?.[0]?.dispose()
    expect(own.stats().handles).toBe(handles)
    return own.stats().peakBytes - bytes
  }
  expect(await peak(1)).toBeLessThan((await peak(usual)) / 4)
})
