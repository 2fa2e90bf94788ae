import { describe, expect, test } from 'vitest'
import { gradients } from '../autograd/backward.ts'
import type { Backend, Value } from '../backend.ts'
import { randn, tensor } from '../create.ts'
import type { FusedAttrs } from '../ops.ts'
import { withPrecision } from '../precision.ts'
import { Random } from '../random.ts'
import { readF64, referenceBackend } from '../reference/index.ts'
import { keep, scope } from '../scope.ts'
import { noGrad } from '../tape.ts'
import { Tensor } from '../tensor.ts'
import { assertClose } from '../testing/index.ts'
import { fallbacks, runFused } from './definition.ts'
import { dispatchPlan, permuteTokens } from './dispatch.ts'
import { groupedMatmul } from './grouped-matmul.ts'
import { routedExperts, routedExpertsDefinition } from './routed-experts.ts'

const [N, K, E, D, I] = [7, 2, 3, 5, 4]
const plain = referenceBackend()
const random = new Random(1)
const leaves = [
  [N, D],
  [E, I, D],
  [E, I, D],
  [E, D, I],
  [N, K],
].map(shape => randn(shape, random, { backend: plain }))
const indices = tensor(
  Int32Array.from({ length: N * K }, (_, i) => (i * 5) % 2),
  [N, K],
  { backend: plain },
)
const plan = dispatchPlan(indices, E)
const seed = randn([N, D], random, { backend: plain })

/** Creates a backend with a kernel that saves what its gradient needs, and records the attributes of its calls. */
function savingBackend() {
  const calls: Array<FusedAttrs['routedExperts']> = []
  const asTensor = (value: Value) => keep(new Tensor(plain, value.handle, value.shape, value.dtype))
  const backend: Backend = {
    ...plain,
    name: 'saving',
    fused: {
      routedExperts(values, attrs) {
        calls.push(attrs)
        const inputs = values.map(asTensor)
        const [x, gate, up, , , order, positions, offsets] = inputs
        const results = noGrad(() => {
          const rows = permuteTokens(x, { topK: K, order, positions, offsets, counts: offsets })
          const saved = attrs.saves ? [gate, up].map(weight => groupedMatmul(rows, weight, offsets)) : []
          return [...routedExpertsDefinition.decompose(inputs, attrs), ...saved]
        })
        return results.map(result => keep(result).handle)
      },
    },
  }
  const toBackend = (x: Tensor) =>
    keep(new Tensor(backend, plain.primitives.reshape([x], {}, [x])[0], x.shape, x.dtype))
  return { backend, calls, toBackend }
}

type Run = (inputs: Tensor[]) => Tensor
/** Returns the gradients of the inputs that `wanted` selects, on the backend of `toBackend`. */
function gradientsOf(run: Run, toBackend: (x: Tensor) => Tensor, wanted: readonly boolean[]) {
  return scope(() => {
    const inputs = [...leaves, plan.order, plan.positions, plan.offsets].map(toBackend)
    const probes = inputs.map((input, i) => {
      if (!wanted[i]) return input
      input.tracked = true
      return input.reshape([...input.shape, 1]).reshape(input.shape)
    })
    const found = gradients(run(probes).mul(toBackend(seed)).sum(), probes)
    return found.map(gradient => (gradient === null ? null : readF64(gradient)))
  })
}
const fused: Run = inputs => runFused(routedExpertsDefinition, inputs, { precision: 'f32', saves: true })[0]
const composed: Run = ([x, gate, up, down, weights]) => routedExperts(x, { gate, up, down }, weights, plan)

describe('the gradient computed from saved outputs of a kernel', () => {
  test.each([
    [true, true, true, true, true],
    [true, false, false, false, true],
    [false, true, false, false, false],
    [false, false, true, false, false],
    [false, false, false, true, false],
    [true, false, false, false, false],
  ])('equals that of separate ops, for the inputs %s, %s, %s, %s, %s', (...wanted) => {
    const { toBackend } = savingBackend()
    const expected = gradientsOf(composed, x => keep(x.detach()), wanted)
    const found = gradientsOf(fused, toBackend, wanted)
    expect(found.map(gradient => gradient !== null)).toEqual([...wanted, false, false, false])
    found.forEach((gradient, i) => {
      if (gradient === null) return
      assertClose(`input ${i}`, gradient, expected[i] as Float64Array, { relative: 1e-12, absolute: 1e-12 })
    })
  })
})

describe('routedExperts', () => {
  const call = (toBackend: (x: Tensor) => Tensor, isTracked: boolean) => {
    const [x, gate, up, down, weights] = leaves.map(toBackend)
    x.tracked = isTracked
    const [order, positions, offsets, counts] = [plan.order, plan.positions, plan.offsets, plan.counts].map(toBackend)
    return routedExperts(x, { gate, up, down }, weights, { topK: K, order, positions, offsets, counts })
  }

  test('uses the kernel in bf16 and fp8, and saves outputs only if a gradient may be needed', () => {
    const { calls, toBackend } = savingBackend()
    call(toBackend, true)
    expect(calls).toEqual([])
    for (const precision of ['bf16', 'fp8'] as const) {
      withPrecision(precision, () => {
        call(toBackend, true)
        call(toBackend, false)
        noGrad(() => call(toBackend, true))
      })
    }
    expect(calls.map(({ saves, precision }) => `${precision} ${saves}`)).toEqual(
      ['bf16', 'fp8'].flatMap(precision => [true, false, false].map(saves => `${precision} ${saves}`)),
    )
  })

  test('without a kernel, is not counted as a fallback', () => {
    const before = fallbacks()
    const out = withPrecision('bf16', () => call(x => keep(x.detach()), false))
    expect(out.shape).toEqual([N, D])
    expect(fallbacks().filter(({ op }) => op === 'routedExperts')).toEqual(
      before.filter(({ op }) => op === 'routedExperts'),
    )
  })
})
