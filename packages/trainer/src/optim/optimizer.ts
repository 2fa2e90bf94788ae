/** @file The interface of an optimizer. */
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

/** An entry of an optimizer's state. */
export interface OptimizerEntry extends StateEntry {
  /**
   * The parameter that this is the state of, element by element. Required to shard the optimizer, and for pipeline and
   * expert parallelism.
   */
  readonly parameter?: Parameter
}

/** Updates parameters from their gradients. `AdamW` and `Muon` implement it. */
export interface Optimizer {
  /** Short name. Checkpoints store it, and only the same optimizer loads their state. */
  readonly name: string
  /**
   * Settings of the optimizer, including how it treats these parameters; stored in checkpoints. `parameters` are those
   * of the complete model, of which this optimizer may update only a part.
   */
  settings(parameters: readonly NamedParameter[]): Readonly<Record<string, unknown>>
  /**
   * Updates every parameter that has a gradient. `gradScale []` multiplies the gradients. Runs inside `scope` and
   * `noGrad`, so intermediate results are freed and not recorded; state that outlives the call is a `Parameter`.
   */
  step(lr: number, gradScale: Tensor): void
  /** The optimizer state, with unique names. */
  entries(): OptimizerEntry[]
  /**
   * Loads stored state after `steps` steps. Nothing is changed unless every entry fits.
   *
   * @throws MoeError E_STATE_DICT
   */
  load(source: StateSource, steps: number): Promise<void>
  /** Frees the state. */
  dispose(): void
}

/** Inputs of a step of a `StagedOptimizer` from the host. */
export interface OptimizerInputs {
  /** Uploaded as `f32`. Every step must have the same count. */
  readonly numbers: Float32Array
  /** Attributes to replace in the recorded ops. */
  readonly updates: AttrUpdates
}

/** An optimizer whose ops can be recorded once and replayed. Its `step` is `begin` followed by `update`. */
export interface StagedOptimizer extends Optimizer {
  /** State tensors that a step replaces. */
  readonly state: readonly Tensor[]
  /** Starts a step and returns its inputs. */
  begin(lr: number): OptimizerInputs
  /**
   * Runs the ops of the step, for the parameters that have gradients. They may depend only on what `begin` returned.
   */
  update(numbers: Tensor, gradScale: Tensor): void
}

/** @throws MoeError E_ATTR unless these are named parameters */
export function checkParameters(op: string, parameters: readonly NamedParameter[]): void {
  if (Array.isArray(parameters) && parameters.every(named => named?.parameter instanceof Parameter)) return
  const problem = 'parameters is not an array of { name, parameter }'
  throw new MoeError({ code: 'E_ATTR', op, problem, fix: 'pass namedParameters(model)' })
}

/** @throws MoeError E_ATTR for a learning rate that is not a number, which would turn all weights into NaN */
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

/**
 * Creates zero state for each tensor, all or none. @throws MoeError E_UNSUPPORTED if the backend does not support the
 * dtype
 */
export const zeroState = (like: readonly Tensor[], dtype: DType = 'f32'): Parameter[] =>
  scope(() => like.map(({ shape, backend }) => zeros(shape, { backend, dtype }))).map(
    tensor => new Parameter(tensor, { trainable: false }),
  )

/** Loads stored state into `state`, rounded if its dtype has fewer bits. */
export async function fillState(state: Parameter, source: StateSource, name: string): Promise<void> {
  const { dtype, shape, backend } = state
  const [data, stored] = [await source.read(name), source.info(name).dtype]
  const own = stored === dtype ? data : encodeHost(dtype, decodeHost(stored, data))
  state.assign(fromHost(own, shape, dtype, backend))
}

/** Maximum number of problems in a message. */
const shownProblems = 20

/** The error for stored state that does not fit the parameters. */
export function stateMismatch(op: string, problems: readonly string[]): MoeError {
  const lines = problems.slice(0, shownProblems)
  const more = problems.length - lines.length
  if (more > 0) lines.push(`and ${more} more (see the error's details)`)
  return new MoeError({
    code: 'E_STATE_DICT',
    op,
    problem: `the stored optimizer state does not fit the model:\n${lines.map(line => `  ${line}`).join('\n')}\n`,
    fix: 'resume with the model that the run was started with',
    details: { problems },
  })
}
