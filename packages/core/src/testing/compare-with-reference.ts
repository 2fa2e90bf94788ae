/** @file Compares ops on a backend with their decompositions on the reference backend: values and gradients. */
import { gradients } from '../autograd/backward.ts'
import type { Backend } from '../backend.ts'
import { fromHost, full, tensor } from '../create.ts'
import { encodeHost } from '../dtype.ts'
import { fallbacks } from '../fused/definition.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { scope } from '../scope.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { assertClose, type Tolerance, tolerances } from './compare.ts'
import type { HostInput } from './run-op.ts'

/** Results of the ops. */
export interface OpResult {
  /** Values of each output. */
  readonly outputs: ArrayLike<number>[]
  /** Gradients of the sum of outputs times fixed random weights, for every f32 input that has one. */
  readonly gradients: Array<ArrayLike<number> | null>
}

const valuesOf = (tensors: ReadonlyArray<Tensor | null>) =>
  Promise.all(tensors.map(async t => (t === null ? null : await t.values())))

async function evaluate(
  backend: Backend,
  inputs: readonly HostInput[],
  op: (...inputs: Tensor[]) => Tensor[],
): Promise<OpResult> {
  const leaves = inputs.map(({ data, shape, dtype = 'f32' }) => {
    return new Parameter(fromHost(encodeHost(dtype, data), shape, dtype, backend), { trainable: dtype === 'f32' })
  })
  const outputs = scope(() => noGrad(() => op(...leaves)))
  const found = scope(() => {
    const parts = op(...leaves)
      .filter(output => output.tracked)
      .map((output, i) => {
        const weights = new Random(i).normal(output.size)
        return output.mul(tensor(weights, output.shape, { backend })).sum()
      })
    if (parts.length === 0) return []
    const loss = parts.reduce((sum, part) => sum.add(part))
    return gradients(loss, leaves)
  })
  const result = { outputs: (await valuesOf(outputs)) as ArrayLike<number>[], gradients: await valuesOf(found) }
  for (const t of [...leaves, ...outputs, ...found]) t?.dispose()
  return result
}

/**
 * Fills memory that outputs of these sizes will reuse with NaN, for any element width, so that elements nobody writes
 * are noticed.
 */
function poison(backend: Backend, all: ReadonlyArray<ArrayLike<number> | null>): void {
  const made = all.flatMap(values =>
    values === null
      ? []
      : [1, 1, 1, 2, 2, 4, 4].map(perWord => full([Math.ceil(values.length / perWord)], Number.NaN, { backend })),
  )
  for (const t of made) t.dispose()
}

/**
 * Runs ops on a backend and as their decompositions on the reference backend, and compares values and gradients. Use it
 * for sizes that are special to a backend's kernels; `backendSuite` covers sizes that are special to an op.
 * @param op computes outputs from the input tensors; outputs with gradients are differentiated with fixed random
 * weights
 * @returns the results of the backend
 * @throws Error if the results differ, if a second run has different bits or unwritten elements, if the backend
 * declined, or if handles leaked
 */
export async function compareWithReference(
  backend: Backend,
  inputs: readonly HostInput[],
  op: (...inputs: Tensor[]) => Tensor[],
  tolerance: Tolerance = tolerances.sum,
): Promise<OpResult> {
  const declined = () => JSON.stringify(fallbacks().filter(entry => entry.backend === backend.name))
  const { handles } = backend.stats()
  const before = declined()
  const expected = await evaluate(referenceBackend(), inputs, op)
  const actual = await evaluate(backend, inputs, op)
  poison(backend, [...actual.outputs, ...actual.gradients])
  const again = await evaluate(backend, inputs, op)
  if (declined() !== before) throw new Error(`the backend declined: ${declined()}`)
  for (const kind of ['outputs', 'gradients'] as const) {
    expected[kind].forEach((want, i) => {
      const got = actual[kind][i]
      if (want === null || got === null) {
        if (want !== got) throw new Error(`${kind} ${i} is ${got === null ? 'missing' : 'unexpected'}`)
        return
      }
      assertClose(`${kind} ${i}`, got, want, tolerance)
      assertClose(`${kind} ${i}, second run`, again[kind][i] as ArrayLike<number>, got, tolerances.exact)
    })
  }
  const left = backend.stats().handles - handles
  if (left !== 0) throw new Error(`${left} handles leaked`)
  return actual
}
