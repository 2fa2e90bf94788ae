/** @file What the trainer asks of an optimizer. */
import {
  type AttrUpdates,
  type DType,
  decodeHost,
  encodeHost,
  fromHost,
  MoeError,
  type NamedParameter,
  Parameter,
  type StateEntry,
  type StateSource,
  scope,
  shown,
  type Tensor,
  zeros,
} from '@moe/core'

/** State of an optimizer. */
export interface OptimizerEntry extends StateEntry {
  /** Whose state it is, element by element. An optimizer that says so can be used where ranks have parts of the model. */
  readonly parameter?: Parameter
}

/** What changes the parameters by their gradients: `AdamW` and `Muon` are two. */
export interface Optimizer {
  /** Short name, stored in checkpoints so that the state of another one is not taken for its own. */
  readonly name: string
  /** The numbers that it was made with, and how it treats these parameters, stored in checkpoints. They are those of the whole model, of which it may have a part. */
  settings(parameters: readonly NamedParameter[]): Readonly<Record<string, unknown>>
  /** Changes every parameter that has a gradient. `gradScale []` multiplies the gradients. */
  step(lr: number, gradScale: Tensor): void
  /** State beside the parameters, under names of its own. */
  entries(): OptimizerEntry[]
  /**
   * Takes over stored state after `steps` steps. Nothing is changed unless every entry fits.
   * @throws MoeError E_STATE_DICT
   */
  load(source: StateSource, steps: number): Promise<void>
  /** Frees the state. */
  dispose(): void
}

/** What a step of a `StagedOptimizer` takes from the host. */
export interface OptimizerInputs {
  /** Uploaded as `f32`, in the same number at every step. */
  readonly numbers: Float32Array
  /** For the ops that a recorded step has. */
  readonly updates: AttrUpdates
}

/** An optimizer whose ops can be recorded once and replayed: `step` is `begin` and `update`. */
export interface StagedOptimizer extends Optimizer {
  /** What a step replaces beside the parameters. */
  readonly state: readonly Tensor[]
  /** Counts a step. */
  begin(lr: number): OptimizerInputs
  /** The ops, of the parameters that have gradients. They depend on nothing of the host but on what `begin` gave. */
  update(numbers: Tensor, gradScale: Tensor): void
}

/** What an optimizer is made from. @throws MoeError E_ATTR */
export function checkParameters(op: string, parameters: readonly NamedParameter[]): void {
  if (Array.isArray(parameters) && parameters.every(named => named?.parameter instanceof Parameter)) return
  const problem = 'the parameters are not a list of { name, parameter }'
  throw new MoeError({ code: 'E_ATTR', op, problem, fix: 'pass namedParameters(model)' })
}

/** What a step is taken with: without it no number would be left in the model. @throws MoeError E_ATTR */
export function checkLearningRate(op: string, lr: number): void {
  if (Number.isFinite(lr)) return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: `the learning rate is ${shown(lr)}`,
    fix: 'pass a number to every step: step(lr, gradScale)',
  })
}

export const isStaged = (optimizer: Optimizer): optimizer is StagedOptimizer => 'begin' in optimizer

/** State for each of the tensors, zeros at first. Without the memory for all of it there is none. @throws MoeError E_UNSUPPORTED where the backend stores no such numbers */
export const zeroState = (like: readonly Tensor[], dtype: DType = 'f32'): Parameter[] =>
  scope(() => like.map(({ shape, backend }) => zeros(shape, { backend, dtype }))).map(
    tensor => new Parameter(tensor, { trainable: false }),
  )

/** Stored state in the place of `state`, rounded where this has fewer bits. */
export async function fillState(state: Parameter, source: StateSource, name: string): Promise<void> {
  const { dtype, shape, backend } = state
  const [data, stored] = [await source.read(name), source.info(name).dtype]
  const own = stored === dtype ? data : encodeHost(dtype, decodeHost(stored, data))
  state.assign(fromHost(own, shape, dtype, backend))
}

/** Lines of a message that somebody reads. */
const shownProblems = 20

/** Stored state that is not that of these parameters. */
export function stateMismatch(op: string, problems: readonly string[]): MoeError {
  const lines = problems.slice(0, shownProblems)
  const more = problems.length - lines.length
  if (more > 0) lines.push(`and ${more} more: all are in the error's details`)
  return new MoeError({
    code: 'E_STATE_DICT',
    op,
    problem: `the stored optimizer state does not fit the model:\n${lines.map(line => `  ${line}`).join('\n')}\n`,
    fix: 'resume with the model that the run was started with',
    details: { problems },
  })
}
