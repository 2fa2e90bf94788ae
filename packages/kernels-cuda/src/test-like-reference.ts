/** @file For tests: ops on the device beside their decompositions on the reference backend, values and gradients. */
import {
  type Backend,
  encodeHost,
  fallbacks,
  fromHost,
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
import { testBackend } from './test-backend.ts'

interface Result {
  readonly outputs: ArrayLike<number>[]
  /** Of the sum of the outputs times fixed random weights, with respect to every f32 input that has one. */
  readonly gradients: Array<ArrayLike<number> | null>
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
    return parts.length === 0
      ? []
      : gradients(
          parts.reduce((sum, part) => sum.add(part)),
          leaves,
        )
  })
  const result = { outputs: (await valuesOf(outputs)) as ArrayLike<number>[], gradients: await valuesOf(found) }
  for (const t of [...leaves, ...outputs, ...found]) t?.dispose()
  return result
}

type Op = (...inputs: Tensor[]) => Tensor[]

/** Throws where they differ, where a second run has other bits, and where the device declined. */
export async function likeReference(
  inputs: readonly HostInput[],
  op: Op,
  tolerance: Tolerance = tolerances.sum,
): Promise<Result> {
  const expected = await evaluate(referenceBackend(), inputs, op)
  const declined = JSON.stringify(fallbacks().filter(({ backend }) => backend !== 'reference'))
  const backend = await testBackend()
  try {
    const actual = await evaluate(backend, inputs, op)
    const again = await evaluate(backend, inputs, op)
    const now = JSON.stringify(fallbacks().filter(({ backend }) => backend !== 'reference'))
    if (now !== declined) throw new Error(`the device declined: ${now}`)
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
    if (backend.stats().handles !== 0) throw new Error(`${backend.stats().handles} handles leaked`)
    return actual
  } finally {
    backend.dispose()
  }
}

/** Normally distributed numbers. */
export function normal(shape: readonly number[], factor = 1): HostInput {
  const size = shape.reduce((product, n) => product * n, 1)
  const random = new Random(3).fork(shape.join()).normal(size)
  return { data: factor === 1 ? random : random.map(x => x * factor), shape }
}
