/** @file Checks that all ranks of a training start alike. */
import { concat, globalNorm, MoeError, type NamedParameter, noGrad, scope, type Tensor } from '@moe/core'
import { gatherValues, type Ranks } from './ranks.ts'

/** Compares the settings of this rank with those of the others. @throws MoeError E_CONFIG unless all are the same */
export async function checkSameSettings(
  ranks: Ranks,
  settings: Readonly<Record<string, unknown>>,
  like: Pick<Tensor, 'backend'>,
): Promise<void> {
  const [first, ...others] = await gatherValues(ranks, settings, like)
  for (const [i, own] of others.entries()) {
    const rank = i + 1
    const name = [...Object.keys(first), ...Object.keys(own)].find(name => own[name] !== first[name])
    if (name === undefined) continue
    throw differing(
      `${name} is ${first[name] ?? 'not set'} on rank 0 but ${own[name] ?? 'not set'} on rank ${rank}`,
      'pass the same model, data and options to train on every rank',
    )
  }
}

/** What a rank starts with. */
interface InitialState {
  readonly step: number
  /** Whether this rank saves checkpoints. */
  readonly saves: boolean
  /** Norms of this rank's weights by name. */
  readonly norms: Readonly<Record<string, number>>
}

/**
 * Compares the step and the weights of this rank with those of the others. A rank that has a part of the model is
 * compared with those that have the same parameters.
 *
 * @returns whether rank 0 saves checkpoints
 * @throws MoeError E_CONFIG
 */
export async function checkSameInitialState(
  ranks: Ranks,
  parameters: readonly NamedParameter[],
  own: Omit<InitialState, 'norms'>,
): Promise<{ saves: boolean }> {
  // If ranks have parts of the model, the parameters that others train are freed.
  const norms = await parameterNorms(parameters.filter(({ parameter }) => parameter.handle !== null))
  const states = await gatherValues<InitialState>(ranks, { ...own, norms }, parameters[0].parameter)
  // For each parameter, the first rank that has it.
  const firstWith = new Map<string, number>()
  for (const [rank, { step, norms }] of states.entries()) {
    for (const name in norms) if (!firstWith.has(name)) firstWith.set(name, rank)
    const firstOf = (name: string) => firstWith.get(name) ?? rank
    const unlike = Object.keys(norms).find(name => !Object.is(states[firstOf(name)].norms[name], norms[name]))
    if (step === states[0].step && unlike === undefined) continue
    const other = unlike === undefined ? 0 : firstOf(unlike)
    const show = ({ step, norms }: InitialState) =>
      `step ${step}${unlike === undefined ? '' : ` with ${unlike} of norm ${norms[unlike]}`}`
    throw differing(
      `rank ${other} starts at ${show(states[other])}, rank ${rank} at ${show(states[rank])}`,
      'create the same model on every rank (with the same seed); to resume, all ranks must read the same folder',
    )
  }
  return states[0]
}

/** The norm of each f32 parameter, by name. */
async function parameterNorms(named: readonly NamedParameter[]): Promise<Record<string, number>> {
  const weights = named.filter(({ parameter }) => parameter.dtype === 'f32')
  if (weights.length === 0) return {}
  using norms = scope(() => noGrad(() => concat(weights.map(({ parameter }) => globalNorm([parameter]).reshape([1])))))
  const values = await norms.values()
  return Object.fromEntries(weights.map(({ name }, i) => [name, values[i]]))
}

const differing = (problem: string, fix: string) => new MoeError({ code: 'E_CONFIG', op: 'train', problem, fix })
