/** @file Finds where NaN or infinity came from, after a step turned out not to be finite. */
import {
  globalNorm,
  type HostArray,
  type Module,
  MoeError,
  type NamedParameter,
  namedParameters,
  noGrad,
  type Parameter,
  type Tensor,
} from '@moe/core'
import { gatherValues, type Ranks } from './ranks.ts'
import type { ShardedUpdate } from './sharded-update.ts'

export interface NonFinite {
  /** Key of the parameter (of the slice, if it is stacked). */
  readonly name: string
  readonly kind: 'value' | 'gradient'
  /** Number of elements that are NaN or infinite. */
  readonly count: number
  readonly size: number
}

type GradientOf = (parameter: Parameter) => Tensor | null

/** The first parameter whose values are not finite, or else the first whose gradient is not. */
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

/**
 * The error for a step whose loss or gradient norm is not finite. Searches the model and its gradients for the cause.
 */
export async function nonFiniteStep(
  model: Module,
  step: number,
  seen: { readonly loss: number; readonly gradNorm: number },
  gradientOf?: GradientOf,
): Promise<MoeError> {
  return stepError(await findNonFinite(namedParameters(model), gradientOf), step, seen)
}

/** The same if each rank has only the gradients of its share. All ranks report the same cause. */
export async function nonFiniteStepOnRanks(
  model: Module,
  { ranks, shard }: ShardedUpdate,
  step: number,
  seen: { readonly loss: number; readonly gradNorm: number },
  gradientOf: GradientOf = parameter => parameter.grad,
): Promise<MoeError> {
  const named = namedParameters(model)
  const value = await findIn('value', named, parameter => parameter)
  const gradient = await findIn('gradient', shard.parameters, gradientOf)
  const found = await gatherValues(ranks, gradient, named[0].parameter)
  return stepError(value ?? found.find(where => where !== null) ?? null, step, seen)
}

const AFTER_NON_FINITE =
  'start again with a lower lr or clip, or resume from an earlier checkpoint with these and allowChanges: true'

/** The same for a known cause. */
export function stepError(
  where: NonFinite | null,
  step: number,
  seen: { readonly loss: number; readonly gradNorm: number },
): MoeError {
  const cause = where === null ? 'although all values and gradients are finite' : `first not finite in ${place(where)}`
  return new MoeError({
    code: 'E_NAN',
    op: 'train',
    problem: `step ${step} has loss ${seen.loss} and gradient norm ${seen.gradNorm}, ${cause}`,
    fix: `the step was not applied; ${AFTER_NON_FINITE}`,
    details: { step, loss: seen.loss, gradNorm: seen.gradNorm, parameter: where?.name, kind: where?.kind },
  })
}

/**
 * Checks the weights that this rank holds before they are saved. An update can make a weight infinite although its
 * gradient was finite, and such a model must not replace a good checkpoint.
 *
 * @param options.ranks if each has a part of the model, so that they can differ. All throw the same error
 * @param options.like a parameter on the backend of the model, even if this rank has no weights
 * @throws MoeError E_NAN
 */
export async function checkFiniteModel(
  weights: readonly NamedParameter[],
  step: number,
  { ranks, like }: { readonly ranks: Ranks | undefined; readonly like: Parameter },
): Promise<void> {
  const ofAll = async <T>(own: T): Promise<T[]> => (ranks === undefined ? [own] : gatherValues(ranks, own, like))
  const finite = Number.isFinite(await normOf(weights))
  if (!(await ofAll(finite)).includes(false)) return
  const found = await ofAll(await findNonFinite(weights))
  throw nonFiniteModel(found.find(where => where !== null) ?? null, step)
}

async function normOf(weights: readonly NamedParameter[]): Promise<number> {
  const trained = weights.flatMap(({ parameter }) => (parameter.dtype === 'f32' ? [parameter] : []))
  const norm = noGrad(() => globalNorm(trained))
  try {
    return await norm.item()
  } finally {
    norm.dispose()
  }
}

/** The error for a model that contains non-finite weights after an update. */
function nonFiniteModel(where: NonFinite | null, step: number): MoeError {
  return new MoeError({
    code: 'E_NAN',
    op: 'train',
    problem: `after step ${step} the model contains ${where === null ? 'weights whose norm overflows f32' : `non-finite numbers, first in ${place(where)}`}`,
    fix: `it was not saved; ${AFTER_NON_FINITE}`,
    details: { step, parameter: where?.name, kind: where?.kind },
  })
}
