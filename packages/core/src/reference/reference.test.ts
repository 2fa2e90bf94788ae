import { describe, expect, test } from 'vitest'
import { gradients } from '../autograd/backward.ts'
import { full, tensor } from '../create.ts'
import type { DType } from '../dtype.ts'
import { runFused } from '../fused/definition.ts'
import { fusedDefinitions } from '../fused/index.ts'
import type { FusedName, OpName } from '../ops.ts'
import { Random } from '../random.ts'
import { scope } from '../scope.ts'
import { noGrad } from '../tape.ts'
import { run, type Tensor } from '../tensor.ts'
import { assertClose, backendSuite, finiteDifference, opCases } from '../testing/index.ts'
import { readF64, referenceBackend } from './index.ts'
import { referencePrimitives } from './primitives.ts'

describe('reference backend', () => {
  for (const check of backendSuite(async () => referenceBackend())) test(check.name, check.run)
})

test('fill rounds the value to the dtype', () => {
  const filled = (value: number, dtype: DType) => readF64(full([1], value, { dtype, backend: referenceBackend() }))[0]
  expect(filled(0.1, 'f32')).toBe(0.1)
  expect(filled(0.1, 'bf16')).toBe(0.10009765625)
  expect(filled(300, 'u8')).toBe(255)
})

test('every primitive and every fused op has a case', () => {
  const covered = new Set(opCases.map(({ op }) => op))
  const all = [...Object.keys(referencePrimitives), ...Object.keys(fusedDefinitions)] as OpName[]
  expect(all.filter(op => !covered.has(op))).toEqual([])
})

describe('gradients equal finite differences in f64', () => {
  const backend = referenceBackend()
  for (const item of opCases) {
    const small = item.inputs.every(({ shape }) => shape.reduce((a, b) => a * b, 1) <= 400)
    const continuous = !['sign', 'floor'].includes((item.attrs as { code?: string }).code ?? '')
    const takesShapeOrInteger = [
      'reshape',
      'expand',
      'slice',
      'pad',
      'topk',
      'fill',
      'compare',
      'dispatchPlan',
    ].includes(item.op)
    if (!small || !continuous || takesShapeOrInteger || item.gradient === false || item.name.includes('bf16')) continue
    if (!item.inputs.some(({ dtype }) => dtype === 'f32')) continue
    // Rounding to fp8 is a step function; its gradient is defined as that of the rounded numbers (see fp8.test.ts).
    if ((item.attrs as { precision?: string }).precision === 'fp8') continue
    // The choice of experts is discontinuous, and equal scores lie on a discontinuity.
    if (item.name === 'equal scores') continue
    test(`${item.op}: ${item.name}`, () => {
      const inputs = item.inputs.map(({ shape, dtype, values, random, low = 0, high = 1 }, i) => {
        const size = shape.reduce((a, b) => a * b, 1)
        const source = new Random(5).fork(`${item.name}/${i}`)
        const numbers =
          values ??
          Array.from(random === 'normal' ? source.normal(size) : source.uniform(size), x =>
            random === 'integer'
              ? low + Math.floor(x * (high - low))
              : random === 'uniform'
                ? low + (high - low) * x
                : x,
          )
        return tensor(numbers, shape, { dtype, backend })
      })
      const forward = (tensors: readonly Tensor[]): Tensor => {
        const outputs =
          item.op in fusedDefinitions
            ? runFused(fusedDefinitions[item.op as FusedName] as never, tensors, item.attrs as never)
            : [run(item.op as 'unary', tensors, item.attrs as never)]
        const weight = tensor(new Random(9).normal(outputs[0].size), outputs[0].shape, { backend })
        return outputs[0].mul(weight).sum()
      }
      const found = scope(() => {
        const probes = inputs.map(input => {
          const leaf = input.detach()
          leaf.tracked = input.dtype === 'f32'
          return leaf.tracked ? leaf.reshape([...leaf.shape, 1]).reshape(leaf.shape) : leaf
        })
        return gradients(forward(probes), probes)
      })
      found.forEach((gradient, i) => {
        if (gradient === null) return
        const expected = finiteDifference(inputs[i], () => scope(() => noGrad(() => readF64(forward(inputs))[0])))
        assertClose(`input ${i}`, readF64(gradient), expected, { relative: 1e-5, absolute: 1e-5 })
      })
    })
  }
})
