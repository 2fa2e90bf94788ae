/** @file The options of `train`, their defaults, and the settings that a resumed run must share with its checkpoint. */
import { createHash } from 'node:crypto'
import { type DirectoryHandle, isDirectoryHandle } from '@moe/checkpoint'
import {
  checkOptions,
  MoeError,
  type NamedParameter,
  namedStreams,
  type OptionNames,
  type Precision,
  precisions,
  shown,
} from '@moe/core'
import type { BatchSource } from './batch-source.ts'
import type { RunRecord } from './checkpoints/trainer-state.ts'
import type { Conversations } from './data/conversations.ts'
import type { Corpus } from './data/corpus.ts'
import type { TokenData } from './data/token-data.ts'
import type { DocumentTokens } from './data/token-dataset.ts'
import { type MicroBatches, microBatchesAt } from './data/training-order.ts'
import type { TrainListener } from './events.ts'
import type { TextTokenizer, TrainableModel } from './model.ts'
import type { ModelOnRanks } from './model-on-ranks.ts'
import { AdamW, type AdamWOptions, adamWNames, adamWProblems, momentsProblem } from './optim/adamw.ts'
import { decayProblem } from './optim/ema.ts'
import { Muon } from './optim/muon.ts'
import type { Optimizer } from './optim/optimizer.ts'
import { type Schedule, warmupCosine } from './optim/schedule.ts'
import type { Ranks } from './ranks.ts'
import type { Preferences } from './rewards/preferences.ts'
import type { Rollouts } from './rewards/rollouts.ts'

/**
 * Options of `train`. Only `data` and `steps` are required, and `tokenizer` if the data consists of texts or
 * conversations.
 */
export interface TrainOptions extends AdamWOptions, DocumentTokens {
  /**
   * Texts or conversations (both need `tokenizer`), tokens, `rollouts` (texts that the model samples and a reward
   * function scores), or `preferences`.
   */
  readonly data: Corpus | Conversations | TokenData | Rollouts | Preferences
  /** Encodes texts. It is saved with the model in every checkpoint. */
  readonly tokenizer?: TextTokenizer | undefined
  /** Number of optimizer steps of the whole run. */
  readonly steps: number
  /** Rows per micro-batch on this rank. Default 8. */
  readonly batchSize?: number | undefined
  /** Trained positions per row. Default 256. */
  readonly sequenceLength?: number | undefined
  /**
   * Restricts attention to the document that a token belongs to. Conversations and examples are then packed, several to
   * a row. Needs a model that `isolates`, as DeepSeek does. Default with such a model: true for conversations,
   * examples, rollouts and preferences, as DeepSeek-V3 was fine-tuned (report, 5.1); false for texts, as it was
   * pre-trained.
   */
  readonly isolate?: boolean | undefined
  /**
   * Micro-batches per step on this rank (gradient accumulation), or a function of the step, for a batch size that
   * grows: `piecewise`. Default 1, or the number that `ranks` requires.
   */
  readonly accumulate?: MicroBatches | undefined
  /** Peak learning rate. Default 1e-3. */
  readonly lr?: number | undefined
  /** Multiplier of `lr` at each step. Default `warmupCosine({ steps })`. */
  readonly schedule?: Schedule | undefined
  /** Clips the global gradient norm to this value. Default 1; Infinity disables clipping. */
  readonly clip?: number | undefined
  /**
   * `'adamw'` (default); `'muon'`, which uses Muon for the hidden matrices and AdamW for the rest, both with the
   * settings given here; or a function that creates an optimizer from the model's parameters (with `ranks`, from those
   * that this rank updates) and sets its settings itself.
   */
  readonly optimizer?: 'adamw' | 'muon' | ((parameters: readonly NamedParameter[]) => Optimizer) | undefined
  /**
   * Precision of matrix products. With `'fp8'`, linear layers and experts use fp8 and the others bf16. Weights stay
   * f32. Default f32.
   */
  readonly precision?: Precision | undefined
  /** Records a step and replays it, if backend, model and optimizer support that: see `TrainingSteps`. Default true. */
  readonly record?: boolean | undefined
  /**
   * Decay of an exponential moving average (EMA) of the weights, for example 0.999. Evaluations then report the EMA as
   * well, and checkpoints contain it as a model of its own. Training itself is unaffected. Takes 4 bytes per parameter
   * on the device, divided among the ranks of data parallelism. Default: no EMA.
   */
  readonly ema?: number | undefined
  /** Seed of the data order and of sampling. Default 0. */
  readonly seed?: number | undefined
  /**
   * This process among those that train the model together: a `Communicator` of `@moe/parallel` (data parallelism), or
   * a `Pipeline` or `ExpertParallel` of this model. Replaces `rank` and `world`. Only rank 0 writes to `out`; to
   * resume, all ranks must be able to read it.
   */
  readonly ranks?: Ranks | ModelOnRanks | undefined
  /** Index of this process among those that share the data and nothing else. Default 0 of 1. */
  readonly rank?: number | undefined
  /** Number of processes that share the data. */
  readonly world?: number | undefined
  /**
   * Folder of the run, for checkpoints, `metrics.jsonl` and `summary.json`. Default: nothing is written. In a browser,
   * a directory handle, for example `await (await navigator.storage.getDirectory()).getDirectoryHandle('run', { create:
   * true })`; it gets checkpoints and `summary.json`, but no log of the steps (use `onEvent`).
   */
  readonly out?: string | DirectoryHandle | undefined
  /** Steps between evaluations on held-out data; 0 to evaluate only at the end. Default 0. */
  readonly evalEvery?: number | undefined
  /**
   * Held-out tokens of these evaluations, spread evenly over the data. The final evaluation uses up to 32 times as many
   * (a million by default). Infinity for all. Default 32,768.
   */
  readonly evalTokens?: number | undefined
  /**
   * Steps per `loads` event and line of `loads.jsonl`, which sum the expert loads; 0 for none. Default: a thousandth of
   * the run, at least 10.
   */
  readonly loadsEvery?: number | undefined
  /** Steps between checkpoints. There is always one at the end. Default 200. */
  readonly checkpointEvery?: number | undefined
  /** Number of checkpoints to keep. Default 2. */
  readonly keepCheckpoints?: number | undefined
  /**
   * `true`: continue from the latest checkpoint in `out`. `'auto'`: the same, or start if there is none. A path:
   * continue from that checkpoint. `false` (default): start, and refuse a folder that contains checkpoints.
   */
  readonly resume?: boolean | 'auto' | (string & {}) | undefined
  /**
   * Resumes even if settings differ from the checkpoint's. The run then no longer continues bit for bit. Default false.
   */
  readonly allowChanges?: boolean | undefined
  /** Starts in a folder that contains a run, and removes that run. Default false. */
  readonly overwrite?: boolean | undefined
  /** Stops after this many seconds of training in this process, and saves a checkpoint. */
  readonly timeLimitSeconds?: number | undefined
  /** Stops the run like Ctrl-C: finishes the step, saves, and returns a result with `interrupted`. */
  readonly signal?: AbortSignal | undefined
  /** Handles SIGINT and SIGTERM while training; a second signal ends the process. Default true. */
  readonly handleSignals?: boolean | undefined
  /** Receives every event, after the built-in listeners. */
  readonly onEvent?: TrainListener | undefined
  /**
   * Shows progress on standard error, or in the console of a browser; or a listener that shows it in another way.
   * Default true.
   */
  readonly progress?: boolean | TrainListener | undefined
}

const names: OptionNames<TrainOptions> = {
  ...adamWNames,
  data: true,
  tokenizer: true,
  bos: true,
  eos: true,
  steps: true,
  batchSize: true,
  sequenceLength: true,
  isolate: true,
  accumulate: true,
  lr: true,
  schedule: true,
  clip: true,
  optimizer: true,
  precision: true,
  record: true,
  ema: true,
  seed: true,
  ranks: true,
  rank: true,
  world: true,
  out: true,
  evalEvery: true,
  evalTokens: true,
  loadsEvery: true,
  checkpointEvery: true,
  keepCheckpoints: true,
  resume: true,
  allowChanges: true,
  overwrite: true,
  timeLimitSeconds: true,
  signal: true,
  handleSignals: true,
  onEvent: true,
  progress: true,
}

export const defaults = {
  batchSize: 8,
  sequenceLength: 256,
  accumulate: 1,
  lr: 1e-3,
  clip: 1,
  precision: 'f32',
  seed: 0,
  rank: 0,
  world: 1,
  evalEvery: 0,
  evalTokens: 32_768,
  checkpointEvery: 200,
  keepCheckpoints: 2,
} as const

/**
 * Maximum number of held-out tokens of an evaluation. The final one is a better estimate, but must not take longer than
 * the training if a large corpus has much held-out data.
 */
export const evaluationLimit = ({ evalTokens }: Pick<ResolvedOptions, 'evalTokens'>, { final }: { final: boolean }) =>
  final ? 32 * evalTokens : evalTokens

export type ResolvedOptions = Required<Pick<TrainOptions, keyof typeof defaults | 'schedule' | 'loadsEvery'>> &
  Omit<TrainOptions, 'ranks'> & {
    readonly ranks?: Ranks | undefined
    /** Set if each rank trains a part of the model. */
    readonly onRanks?: ModelOnRanks | undefined
  }

/** @throws MoeError E_CONFIG that lists all invalid options */
export function resolveOptions(options: TrainOptions): ResolvedOptions {
  checkOptions('train', options, names)
  const given = Object.fromEntries(
    Object.entries(options).filter(([, value]) => value !== undefined),
  ) as unknown as TrainOptions
  const problems: string[] = []
  const { ranks, onRanks, ...fromRanks } = resolveRanks(given.ranks, problems)
  const merged = { ...defaults, ...given, ...fromRanks, ranks, onRanks }
  if (onRanks?.microBatches !== undefined && (given.accumulate ?? onRanks.microBatches) !== onRanks.microBatches)
    problems.push(
      `accumulate is ${shown(given.accumulate)}, but ranks need ${onRanks.microBatches} micro-batches per step`,
    )
  const integer = (name: keyof typeof merged, least: number) => {
    const value = merged[name]
    if (!Number.isSafeInteger(value) || (value as number) < least) {
      problems.push(`${name} is ${shown(value)}, expected an integer of at least ${least}`)
    }
  }
  integer('steps', 1)
  for (const name of ['batchSize', 'world', 'keepCheckpoints', 'checkpointEvery'] as const) integer(name, 1)
  if (merged.evalTokens !== Number.POSITIVE_INFINITY) integer('evalTokens', 1)
  if (typeof merged.accumulate !== 'function') integer('accumulate', 1)
  integer('sequenceLength', 2)
  for (const name of ['seed', 'rank', 'evalEvery'] as const) integer(name, 0)
  if (merged.loadsEvery !== undefined) integer('loadsEvery', 0)
  const { lr, clip, rank, world, precision, resume, out, optimizer = 'adamw' } = merged
  if (!(Number.isFinite(lr) && lr > 0)) problems.push(`lr is ${shown(lr)}, expected a positive number`)
  if (!(typeof clip === 'number' && clip > 0))
    problems.push(`clip is ${shown(clip)}, expected a positive number, or Infinity for none`)
  if (rank >= world) problems.push(`rank is ${rank}, but with a world of ${world} it must be below that`)
  if (!precisions.includes(precision))
    problems.push(`precision is ${shown(precision)}, expected 'f32', 'bf16' or 'fp8'`)
  if (typeof optimizer !== 'function' && optimizer !== 'adamw' && optimizer !== 'muon') {
    problems.push(`optimizer is ${shown(optimizer)}, expected 'adamw', 'muon' or a function`)
  }
  const ofOptimizer = (Object.keys(adamWNames) as (keyof AdamWOptions)[]).filter(name => given[name] !== undefined)
  if (typeof optimizer === 'function' && ofOptimizer.length > 0)
    problems.push(
      `${ofOptimizer.join(' and ')} is given, but only the built-in optimizers use it: set it in your function`,
    )
  const { timeLimitSeconds = 0 } = merged
  if (!(typeof timeLimitSeconds === 'number' && timeLimitSeconds >= 0))
    problems.push(`timeLimitSeconds is ${shown(timeLimitSeconds)}, expected a number of at least 0`)
  if (ranks && (given.rank ?? given.world) !== undefined)
    problems.push('rank or world is given together with ranks, which determines both')
  for (const name of ['schedule', 'onEvent', 'decays'] as const) {
    const value: unknown = merged[name]
    if (value !== undefined && typeof value !== 'function')
      problems.push(`${name} is ${shown(value)}, expected a function`)
  }
  const { data, signal, betas = [], progress } = merged
  if (data === undefined) problems.push('data is missing, expected training texts or tokens')
  else if (data?.training === undefined) {
    problems.push('data has no training part: create it with texts(documents) or textFiles(patterns)')
  } else if (isRolloutsOrPreferences(data)) {
    problems.push(...rolloutProblems(data, merged))
  } else if ('template' in data && (given.bos ?? given.eos) !== undefined) {
    problems.push('bos or eos is given together with conversations, whose template writes these tokens')
  }
  if (out !== undefined && typeof out !== 'string' && !isDirectoryHandle(out))
    problems.push(`out is ${shown(out)}, expected the path of a folder or a directory handle`)
  if (signal !== undefined && typeof signal?.addEventListener !== 'function') {
    problems.push('signal is not an AbortSignal (to use an AbortController, pass its .signal)')
  }
  if (progress !== undefined && typeof progress !== 'boolean' && typeof progress !== 'function') {
    problems.push(`progress is ${shown(progress)}, expected true, false or a function`)
  }
  problems.push(...adamWProblems(merged))
  const momentProblem = momentsProblem(merged.moments ?? 'f32', Array.isArray(betas) ? betas : [])
  if (momentProblem !== undefined) problems.push(momentProblem)
  const emaProblem = merged.ema === undefined ? undefined : decayProblem('ema', merged.ema)
  if (emaProblem !== undefined) problems.push(emaProblem)
  if (resume && out === undefined) problems.push('resume is given without out, the folder of the run')
  if (problems.length > 0) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'train',
      problem: problems.length === 1 ? problems[0] : `\n${problems.map(line => `  ${line}`).join('\n')}\n`,
      fix: 'change these options',
      details: { problems },
    })
  }
  const { steps, schedule = warmupCosine({ steps }), loadsEvery = Math.max(10, Math.ceil(steps / 1000)) } = merged
  return { ...merged, schedule, loadsEvery }
}

/** Whether the model learns from scored texts (rollouts or preferences) and not from a data set. */
export const isRolloutsOrPreferences = (data: TrainOptions['data']): data is Rollouts | Preferences =>
  'reward' in data || 'beta' in data

/** Options that rollouts and preferences do not support. */
function rolloutProblems(
  data: Rollouts | Preferences,
  { steps, ranks, onRanks, world, eos, accumulate }: Partial<ResolvedOptions>,
): string[] {
  const { updates, what } = 'reward' in data ? { ...data, what: 'rollouts' } : { updates: 1, what: 'preferences' }
  const left = updates > 1 && Number(steps) % updates !== 0
  return [
    ...(onRanks && (onRanks.nlls === undefined || ('reward' in data && onRanks.lead === undefined))
      ? [`ranks is ${shown(onRanks)}, which does not support ${what}: pass an ExpertParallel, or the communicator`]
      : []),
    ...(ranks || world === 1
      ? []
      : [`world is ${world} without ranks, but processes can share ${what} only if they train together: pass ranks`]),
    ...(eos === undefined
      ? []
      : [`eos is given together with ${what}, whose texts end as the model or the template defines`]),
    ...(onRanks?.microBatches !== undefined || accumulate === 1
      ? []
      : [`accumulate is given together with ${what}, whose steps always use all of their texts`]),
    ...(left ? [`steps is ${steps}, expected a multiple of the ${updates} updates of rollouts`] : []),
  ]
}

/** This process and its share of the data, as `ranks` defines them. */
function resolveRanks(given: TrainOptions['ranks'], problems: string[]): Partial<ResolvedOptions> {
  if (given === undefined) return {}
  const onRanks = 'synchronize' in given ? given : undefined
  const ranks = 'synchronize' in given ? given.ranks : given
  if (typeof ranks?.allReduce !== 'function') {
    problems.push(
      `ranks is ${(given as unknown) instanceof Promise ? 'a promise' : 'not a communicator'}, expected the result of await mpi() or local(size, work), a Pipeline or an ExpertParallel`,
    )
    return {}
  }
  const { microBatches } = onRanks ?? {}
  return {
    ranks,
    onRanks,
    ...(onRanks?.dataShard ?? { rank: ranks.rank, world: ranks.size }),
    ...(microBatches !== undefined && { accumulate: microBatches }),
  }
}

/** Creates the optimizer that the options select. */
export function makeOptimizer(options: ResolvedOptions, parameters: readonly NamedParameter[]): Optimizer {
  const { optimizer = 'adamw' } = options
  if (typeof optimizer === 'function') return optimizer(parameters)
  // `precision` is not passed on: for Muon, it is the precision of its own iterations.
  const { betas, eps, weightDecay, decays, moments } = options
  const settings = { betas, eps, weightDecay, decays, moments }
  return optimizer === 'muon' ? new Muon(parameters, settings) : new AdamW(parameters, settings)
}

/** The settings that determine the numbers of a run. */
export function recordRun(
  options: ResolvedOptions,
  data: Pick<BatchSource, 'identity' | 'isolate'>,
  model: TrainableModel,
  parameters: readonly NamedParameter[],
  optimizer: Optimizer,
): RunRecord {
  const streams = namedStreams(model).map(({ name }) => name)
  const shapes = parameters.map(({ name, parameter }) => `${name} ${parameter.dtype} ${parameter.shape.join('x')}`)
  return {
    steps: options.steps,
    batchSize: options.batchSize,
    sequenceLength: options.sequenceLength,
    // Ranks that train together count as additional micro-batches of one step. Rollouts and preferences include the
    // ranks in `identity` instead, because a step builds its micro-batches from its texts.
    accumulate: microBatchesOf(options),
    world: options.ranks === undefined ? options.world : 1,
    seed: options.seed,
    lr: options.lr,
    schedule: valuesOf(options.schedule, options.steps),
    // JSON has no Infinity.
    clip: options.clip === Number.POSITIVE_INFINITY ? null : options.clip,
    precision: options.precision,
    ...(data.isolate && { isolate: true }),
    ...(options.ema !== undefined && { ema: options.ema }),
    optimizer: `${optimizer.name} ${JSON.stringify(optimizer.settings(parameters))}`,
    data: data.identity,
    parameters: `${shapes.length} of ${parameters.reduce((sum, { parameter }) => sum + parameter.size, 0)} numbers (${digest(shapes.join())})`,
    ...(streams.length > 0 && { streams: streams.join(' ') }),
    ...Object.fromEntries(
      Object.entries(model.settings ?? {})
        .map(([name, value]) => [`model.${name}`, recorded(value, options.steps)])
        .filter(([, value]) => value !== undefined),
    ),
  }
}

function microBatchesOf({ accumulate, ranks, data, world, steps }: ResolvedOptions): number | string {
  const factor = ranks === undefined || isRolloutsOrPreferences(data) ? 1 : world
  if (typeof accumulate === 'number') return accumulate * factor
  return valuesOf(step => microBatchesAt(accumulate, step) * factor, steps) as string
}

/** The recorded form of a model setting; undefined if it cannot be compared. */
function recorded(value: unknown, steps: number): RunRecord[string] | undefined {
  if (typeof value === 'function') {
    try {
      return valuesOf(value as Schedule, steps)
    } catch {
      // The function takes something other than a step.
      return undefined
    }
  }
  return typeof value === 'object' ? JSON.stringify(value) : (value as RunRecord[string] | undefined)
}

/** A digest of a schedule's values over the run; undefined if it does not return numbers. */
function valuesOf(schedule: Schedule, steps: number): string | undefined {
  const values = Array.from({ length: steps }, (_, step) => schedule(step))
  return values.every(value => typeof value === 'number') ? `a schedule (${digest(values.join())})` : undefined
}

const digest = (text: string) => createHash('sha256').update(text).digest('hex').slice(0, 16)
