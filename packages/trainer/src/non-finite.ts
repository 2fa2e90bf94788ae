/** @file Where NaN and infinity came from: looked for only after they were seen. */
import {
  type HostArray,
  type Module,
  MoeError,
  type NamedParameter,
  namedParameters,
  type Parameter,
  type Tensor,
} from '@moe/core'
import { gatherValues } from './ranks.ts'
import type { SharedUpdate } from './shared-update.ts'

export interface NonFinite {
  /** Key of the parameter (of its slice, when it is stacked). */
  readonly name: string
  readonly kind: 'value' | 'gradient'
  /** Elements that are NaN or infinite. */
  readonly count: number
  readonly size: number
}

type GradientOf = (parameter: Parameter) => Tensor | null

/** The first parameter whose values are not finite; else the first whose gradient is not. */
export async function findNonFinite(
  parameters: readonly NamedParameter[],
  gradientOf: GradientOf = parameter => parameter.grad,
): Promise<NonFinite | null> {
  return (
    (await findIn('value', parameters, parameter => parameter)) ?? (await findIn('gradient', parameters, gradientOf))
  )
}

async function findIn(
  kind: NonFinite['kind'],
  parameters: readonly NamedParameter[],
  tensorOf: GradientOf,
): Promise<NonFinite | null> {
  for (const named of parameters) {
    const tensor = tensorOf(named.parameter)
    if (tensor === null || tensor.dtype !== 'f32') continue
    const found = inspect(named, kind, await tensor.data())
    if (found !== null) return found
  }
  return null
}

function inspect(named: NamedParameter, kind: NonFinite['kind'], data: HostArray): NonFinite | null {
  let first = -1
  let count = 0
  for (let i = 0; i < data.length; i++) {
    if (Number.isFinite(data[i])) continue
    if (first < 0) first = i
    count++
  }
  if (first < 0) return null
  const slice = named.slices === undefined ? 0 : Math.floor((first / data.length) * named.slices.length)
  return { name: named.slices?.[slice] ?? named.name, kind, count, size: data.length }
}

const place = (where: NonFinite) =>
  `the ${where.kind === 'value' ? 'values' : 'gradient'} of ${where.name}: ${where.count} of ${where.size} elements`

/** The error for a step whose loss or gradient norm is not a number; looks for the cause in the model as it is, and its gradients. */
export async function nonFiniteStep(
  model: Module,
  step: number,
  seen: { readonly loss: number; readonly gradNorm: number },
  gradientOf?: GradientOf,
): Promise<MoeError> {
  return stepError(await findNonFinite(namedParameters(model), gradientOf), step, seen)
}

/** The same where each rank has the gradients of its share alone: all tell the first in their order. */
export async function nonFiniteStepOnRanks(
  model: Module,
  { ranks, share }: SharedUpdate,
  step: number,
  seen: { readonly loss: number; readonly gradNorm: number },
  gradientOf: GradientOf = parameter => parameter.grad,
): Promise<MoeError> {
  const named = namedParameters(model)
  const value = await findIn('value', named, parameter => parameter)
  const gradient = await findIn('gradient', share.parameters, gradientOf)
  const found = await gatherValues(ranks, gradient, named[0].parameter)
  return stepError(value ?? found.find(where => where !== null) ?? null, step, seen)
}

/** The same, where the cause is known. */
export function stepError(
  where: NonFinite | null,
  step: number,
  seen: { readonly loss: number; readonly gradNorm: number },
): MoeError {
  const first = where === null ? 'each value and gradient is finite by itself' : `not finite first in ${place(where)}`
  return new MoeError({
    code: 'E_NAN',
    op: 'train',
    problem: `step ${step} has loss ${seen.loss} and gradient norm ${seen.gradNorm}, ${first}`,
    fix: 'the step was not applied and earlier checkpoints are whole: resume from one with a lower lr or clip',
    details: { step, loss: seen.loss, gradNorm: seen.gradNorm, parameter: where?.name, kind: where?.kind },
  })
}

/** The error for a model that an update has made unusable. */
export async function nonFiniteModel(model: Module, step: number): Promise<MoeError> {
  const where = await findNonFinite(namedParameters(model))
  return new MoeError({
    code: 'E_NAN',
    op: 'train',
    problem: `after step ${step} the model holds ${where === null ? 'weights too large for f32' : `numbers that are not finite, first in ${place(where)}`}`,
    fix: 'it was not saved and earlier checkpoints are whole: resume from one with a lower lr or clip',
    details: { step, parameter: where?.name, kind: where?.kind },
  })
}
