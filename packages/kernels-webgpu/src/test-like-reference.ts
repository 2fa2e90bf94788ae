/** @file For tests: ops on a GPU beside their decompositions on the reference backend, values and gradients. */
import {
  type Backend,
  encodeHost,
  fallbacks,
  fromHost,
  full,
  gradients,
  noGrad,
  Parameter,
  Random,
  scope,
  type Tensor,
  tensor,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, type HostInput, type Tolerance, tolerances } from '@moe/core/testing'

type Numbers = ArrayLike<number>
type Op = (...inputs: Tensor[]) => Tensor[]

interface Result {
  readonly outputs: Numbers[]
  /** Of the sum of the outputs times fixed random weights, with respect to every f32 input that has one. */
  readonly gradients: Array<Numbers | null>
}

const valuesOf = (tensors: ReadonlyArray<Tensor | null>) =>
  Promise.all(tensors.map(async t => (t === null ? null : await t.values())))

async function evaluate(backend: Backend, inputs: readonly HostInput[], op: Op): Promise<Result> {
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
  const result = { outputs: (await valuesOf(outputs)) as Numbers[], gradients: await valuesOf(found) }
  for (const t of [...leaves, ...outputs, ...found]) t?.dispose()
  return result
}

/** Leaves NaN in memory that outputs of these sizes will get, in elements of any width, so that those which nobody writes are seen. */
function poison(backend: Backend, all: ReadonlyArray<Numbers | null>): void {
  const made = all.flatMap(values =>
    values === null
      ? []
      : [1, 1, 1, 2, 2, 4, 4].map(perWord => full([Math.ceil(values.length / perWord)], Number.NaN, { backend })),
  )
  for (const t of made) t.dispose()
}

/** Throws where they differ, where a second run has other bits, and where the device declined. */
export async function likeReference(
  backend: Backend,
  inputs: readonly HostInput[],
  op: Op,
  tolerance: Tolerance = tolerances.sum,
): Promise<Result> {
  const declined = () => JSON.stringify(fallbacks().filter(entry => entry.backend === backend.name))
  const { handles } = backend.stats()
  const before = declined()
  const expected = await evaluate(referenceBackend(), inputs, op)
  const actual = await evaluate(backend, inputs, op)
  poison(backend, [...actual.outputs, ...actual.gradients])
  const again = await evaluate(backend, inputs, op)
  if (declined() !== before) throw new Error(`the device declined: ${declined()}`)
  for (const kind of ['outputs', 'gradients'] as const) {
    expected[kind].forEach((want, i) => {
      const got = actual[kind][i]
      if (want === null || got === null) {
        if (want !== got) throw new Error(`${kind} ${i} is ${got === null ? 'missing' : 'unexpected'}`)
        return
      }
      assertClose(`${kind} ${i}`, got, want, tolerance)
      assertClose(`${kind} ${i}, second run`, again[kind][i] as Numbers, got, tolerances.exact)
    })
  }
  const left = backend.stats().handles - handles
  if (left !== 0) throw new Error(`${left} handles leaked`)
  return actual
}

/** Normally distributed numbers. */
export function normal(shape: readonly number[], factor = 1): HostInput {
  const size = shape.reduce((product, n) => product * n, 1)
  const random = new Random(3).fork(shape.join()).normal(size)
  return { data: random.map(x => x * factor), shape }
}

/** Integers that are given. */
export const integers = (data: readonly number[], shape: readonly number[] = [data.length]): HostInput => {
  return { data, shape, dtype: 'i32' }
}
