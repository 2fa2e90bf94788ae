/** @file What `train` takes, what is assumed where nothing is said, and what of it a checkpoint must agree with. */
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
import type { RunRecord } from './checkpoints/trainer-state.ts'
import type { Conversations } from './data/conversations.ts'
import type { Corpus } from './data/corpus.ts'
import type { Lessons } from './data/lessons.ts'
import type { Mixture } from './data/mixture.ts'
import type { DocumentTokens } from './data/token-dataset.ts'
import type { TokenStream } from './data/token-stream.ts'
import { type MicroBatches, microBatchesAt } from './data/training-order.ts'
import type { TrainListener } from './events.ts'
import type { TextTokenizer, TrainableModel } from './model.ts'
import type { ModelOnRanks } from './model-on-ranks.ts'
import { AdamW, type AdamWOptions, adamWNames, momentsProblem } from './optim/adamw.ts'
import { decayProblem } from './optim/ema.ts'
import { Muon } from './optim/muon.ts'
import type { Optimizer } from './optim/optimizer.ts'
import { type Schedule, warmupCosine } from './optim/schedule.ts'
import type { Ranks } from './ranks.ts'
import type { Preferences } from './rewards/preferences.ts'
import type { Rollouts } from './rewards/rollouts.ts'

/** Tokens that were made beforehand: in memory (`TokenDataset`), on disk (`tokenFiles`), or of several sources (`mixture`). */
export interface TokenData {
  /** What is trained on. */
  readonly training: TokenStream | Mixture
  /** What is measured on, or several such streams by name, each of which is told of by itself. Default: nothing. */
  readonly validation?: TokenStream | Readonly<Record<string, TokenStream>>
}

/** What `train` is told. Only `data` and `steps` are needed, and `tokenizer` where the data are texts or conversations. */
export interface TrainOptions extends AdamWOptions, DocumentTokens {
  /** Texts or conversations (then `tokenizer` is needed), tokens, `rollouts`, which the model makes itself and is rewarded for, or `preferences`. */
  readonly data: Corpus | Conversations | TokenData | Rollouts | Preferences
  /** Makes tokens of texts, and is stored beside the model in every checkpoint. */
  readonly tokenizer?: TextTokenizer
  /** Optimizer steps of the whole run. */
  readonly steps: number
  /** Rows of a micro-batch on this rank. Default 8. */
  readonly batchSize?: number
  /** Positions of a row. Default 256. */
  readonly sequenceLength?: number
  /**
   * Whether attention sees nothing before the document that a token belongs to. Default: for conversations and examples, which then share rows, as DeepSeek-V3 was
   * fine-tuned (report, 5.1); not for texts, as it was pre-trained. Needs a model that `isolates`, as DeepSeek does.
   */
  readonly isolate?: boolean
  /** Micro-batches of a step on this rank, or a function of the steps before it, for a batch that grows: `piecewise`. Default 1, or as many as `ranks` need. */
  readonly accumulate?: MicroBatches
  /** Peak learning rate. Default 1e-3. */
  readonly lr?: number
  /** Default `warmupCosine({ steps })`. */
  readonly schedule?: Schedule
  /** Largest norm over all gradients. Default 1; Infinity for none. */
  readonly clip?: number
  /**
   * `'adamw'` (default), or `'muon'` for the hidden matrices and AdamW for the rest, both with the settings given
   * here; or a function that makes another one from the model's parameters, or from those that this one of the `ranks` updates.
   */
  readonly optimizer?: 'adamw' | 'muon' | ((parameters: readonly NamedParameter[]) => Optimizer)
  /** Arithmetic of matrix products; in `'fp8'` those of linear layers and experts, the others in bf16. Default f32. */
  readonly precision?: Precision
  /** Record a step and replay it where backend, model and optimizer can: see `TrainingSteps`. Default true. */
  readonly record?: boolean
  /**
   * Keeps an exponential moving average of the weights, each step's weighing this much of the next one's (0.999, say): measurements tell what it is worth beside the weights, and checkpoints hold it as a model
   * of its own. The training is the same with and without. It takes 4 bytes a parameter on the device. Default: none.
   */
  readonly ema?: number
  /** Names the order of the data. Default 0. */
  readonly seed?: number
  /**
   * This process among those that train the model together, each with its share of every step's rows: a `Communicator` of `@moe/parallel`. Or with its part of the model: a `Pipeline` or an `ExpertParallel` of
   * this model. In place of `rank` and `world`. Rank 0 alone writes to `out`, which all must see to resume.
   */
  readonly ranks?: Ranks | ModelOnRanks
  /** This process among those that share the data, without anything else in common. Default 0 of 1. */
  readonly rank?: number
  /** Processes that share the data. */
  readonly world?: number
  /**
   * Folder of the run: checkpoints, `metrics.jsonl`, `summary.json`. Default: nothing is written. In a page, the handle of a folder, such as
   * `await (await navigator.storage.getDirectory()).getDirectoryHandle('run', { create: true })`: it gets checkpoints and `summary.json`, and of the steps `onEvent` is told.
   */
  readonly out?: string | DirectoryHandle
  /** Steps between measurements of held-out data; 0 for one at the end only. Default 0. */
  readonly evalEvery?: number
  /** Held-out tokens of those measurements, spread evenly. The one at the end takes all. Default 32,768. */
  readonly evalTokens?: number
  /** Steps whose loads of experts are told together, as a `loads` event and a line of `loads.jsonl`; 0 for none. Default: a thousandth of the run, 10 or more. */
  readonly loadsEvery?: number
  /** Steps between checkpoints; there is always one at the end. Default 200. */
  readonly checkpointEvery?: number
  /** Checkpoints that stay. Default 2. */
  readonly keepCheckpoints?: number
  /**
   * `true`: go on after the latest checkpoint in `out`. `'auto'`: likewise, or begin if there is none. A path: go on
   * from that checkpoint. `false` (default): begin, and refuse a folder that has checkpoints.
   */
  readonly resume?: boolean | 'auto' | (string & {})
  /**
   * Resume although settings differ from the checkpoint's. The run is then no longer the same, bit for bit. Default
   * false.
   */
  readonly allowChanges?: boolean
  /** Begin in a folder that holds a run, and remove it. Default false. */
  readonly overwrite?: boolean
  /** Stops after so many seconds of training in this process, with a checkpoint. */
  readonly timeLimitSeconds?: number
  /** Stops like Ctrl-C: finishes the step, saves, returns with `interrupted`. */
  readonly signal?: AbortSignal
  /** Listen to SIGINT and SIGTERM while training; a second one ends the process. Default true. */
  readonly handleSignals?: boolean
  /** Gets every event, after the built-in listeners. */
  readonly onEvent?: TrainListener
  /** Progress on standard error, in a page in the console. Default true; a listener to draw in another way. */
  readonly progress?: boolean | TrainListener
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

export type ResolvedOptions = Required<Pick<TrainOptions, keyof typeof defaults | 'schedule' | 'loadsEvery'>> &
  Omit<TrainOptions, 'ranks'> & {
    readonly ranks?: Ranks | undefined
    /** Where each rank has a part of the model. */
    readonly onRanks?: ModelOnRanks | undefined
  }

/** @throws MoeError E_CONFIG that lists every setting that cannot be */
export function resolveOptions(options: TrainOptions): ResolvedOptions {
  checkOptions('train', options, names)
  const given = Object.fromEntries(
    Object.entries(options).filter(([, value]) => value !== undefined),
  ) as unknown as TrainOptions
  const problems: string[] = []
  const { ranks, onRanks, ...ofRanks } = resolveRanks(given.ranks, problems)
  const merged = { ...defaults, ...given, ...ofRanks, ranks, onRanks }
  if (onRanks?.microBatches !== undefined && (given.accumulate ?? onRanks.microBatches) !== onRanks.microBatches)
    problems.push(`accumulate is ${shown(given.accumulate)}, ranks take ${onRanks.microBatches} micro-batches a step`)
  const whole = (name: keyof typeof merged, least: number) => {
    const value = merged[name]
    if (!Number.isSafeInteger(value) || (value as number) < least) {
      problems.push(`${name} is ${shown(value)}, needs a whole number from ${least}`)
    }
  }
  whole('steps', 1)
  for (const name of ['batchSize', 'world', 'keepCheckpoints', 'checkpointEvery', 'evalTokens'] as const) whole(name, 1)
  if (typeof merged.accumulate !== 'function') whole('accumulate', 1)
  whole('sequenceLength', 2)
  for (const name of ['seed', 'rank', 'evalEvery'] as const) whole(name, 0)
  if (merged.loadsEvery !== undefined) whole('loadsEvery', 0)
  const { lr, clip, rank, world, precision, resume, out, optimizer = 'adamw' } = merged
  if (!(Number.isFinite(lr) && lr > 0)) problems.push(`lr is ${shown(lr)}, needs a positive number`)
  if (!(typeof clip === 'number' && clip > 0))
    problems.push(`clip is ${shown(clip)}, needs a positive number, or Infinity for none`)
  if (rank >= world) problems.push(`rank is ${rank} of ${world}; ranks count from 0`)
  if (!precisions.includes(precision)) problems.push(`precision is ${shown(precision)}, needs 'f32', 'bf16' or 'fp8'`)
  if (typeof optimizer !== 'function' && optimizer !== 'adamw' && optimizer !== 'muon') {
    problems.push(`optimizer is ${shown(optimizer)}, needs 'adamw', 'muon' or a function`)
  }
  if (ranks && (given.rank ?? given.world) !== undefined)
    problems.push('rank or world is given beside ranks, which has both')
  for (const name of ['schedule', 'onEvent', 'decays'] as const) {
    const value: unknown = merged[name]
    if (value !== undefined && typeof value !== 'function')
      problems.push(`${name} is ${shown(value)}, needs a function`)
  }
  const { data, signal, betas = [], progress } = merged
  if (data === undefined) problems.push('data is missing, needs training texts or tokens')
  else if (data?.training === undefined) {
    problems.push('data has no training part: make it with texts(documents) or textFiles(patterns)')
  } else if (isJudged(data)) {
    problems.push(...againstJudged(data, merged))
  } else if ('template' in data && (given.bos ?? given.eos) !== undefined) {
    problems.push('bos or eos is given beside conversations, whose template writes them')
  }
  if (out !== undefined && typeof out !== 'string' && !isDirectoryHandle(out))
    problems.push(`out is ${shown(out)}, needs the path of a folder, or a handle of one`)
  if (signal !== undefined && typeof signal?.addEventListener !== 'function') {
    problems.push('signal is no AbortSignal (of an AbortController, pass .signal)')
  }
  if (progress !== undefined && typeof progress !== 'boolean' && typeof progress !== 'function') {
    problems.push(`progress is ${shown(progress)}, needs true, false or a function`)
  }
  if (!Array.isArray(betas) || !betas.every(beta => beta >= 0 && beta < 1) || ![0, 2].includes(betas.length)) {
    problems.push(`betas is ${shown(betas)}, needs two numbers of at least 0 and below 1`)
  }
  const inMoments = momentsProblem(merged.moments ?? 'f32', Array.isArray(betas) ? betas : [])
  if (inMoments !== undefined) problems.push(inMoments)
  const inEma = merged.ema === undefined ? undefined : decayProblem('ema', merged.ema)
  if (inEma !== undefined) problems.push(inEma)
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

/** Whether texts are not learned as they are, but as somebody judges them. */
export const isJudged = (data: TrainOptions['data']): data is Rollouts | Preferences =>
  'reward' in data || 'beta' in data

/** What does not go with such data. */
function againstJudged(
  data: Rollouts | Preferences,
  { steps, ranks, onRanks, world, eos, accumulate }: Partial<ResolvedOptions>,
): string[] {
  const { updates, what } = 'reward' in data ? { ...data, what: 'rollouts' } : { updates: 1, what: 'preferences' }
  const left = updates > 1 && Number(steps) % updates !== 0
  return [
    ...(onRanks ? [`ranks is ${shown(onRanks)}, and ${what} need ranks that have the whole model each`] : []),
    ...(ranks || world === 1
      ? []
      : [`world is ${world} without ranks, and processes share ${what} only where they take each step together`]),
    ...(eos === undefined ? [] : [`eos is given beside ${what}, whose texts end as the model or the template has it`]),
    ...(onRanks || accumulate === 1 ? [] : [`accumulate is given beside ${what}: a step learns from all of its texts`]),
    ...(left ? [`steps is ${steps}, needs a multiple of the ${updates} updates of rollouts`] : []),
  ]
}

/** What `ranks` says about this process and its data. */
function resolveRanks(given: TrainOptions['ranks'], problems: string[]): Partial<ResolvedOptions> {
  if (given === undefined) return {}
  const onRanks = 'gather' in given ? given : undefined
  const ranks = 'gather' in given ? given.ranks : given
  if (typeof ranks?.allReduce !== 'function') {
    problems.push(
      `ranks is ${(given as unknown) instanceof Promise ? 'a promise' : 'no communicator'}, needs what await mpi() or local(size, work) gives, a Pipeline or an ExpertParallel`,
    )
    return {}
  }
  const { microBatches } = onRanks ?? {}
  return {
    ranks,
    onRanks,
    ...(onRanks?.dataShare ?? { rank: ranks.rank, world: ranks.size }),
    ...(microBatches !== undefined && { accumulate: microBatches }),
  }
}

/** The optimizer that the options ask for. */
export function makeOptimizer(options: ResolvedOptions, parameters: readonly NamedParameter[]): Optimizer {
  const { optimizer = 'adamw' } = options
  if (typeof optimizer === 'function') return optimizer(parameters)
  // `precision` means something else to Muon.
  const { betas, eps, weightDecay, decays, moments } = options
  const settings = { betas, eps, weightDecay, decays, moments }
  return optimizer === 'muon' ? new Muon(parameters, settings) : new AdamW(parameters, settings)
}

/** What a run is, as far as its numbers go. */
export function recordRun(
  options: ResolvedOptions,
  data: Pick<Lessons, 'identity' | 'isolate'>,
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
    // Ranks that train together are as many more micro-batches, or texts (in `identity`), of which a step makes its micro-batches.
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
  const factor = ranks === undefined || isJudged(data) ? 1 : world
  if (typeof accumulate === 'number') return accumulate * factor
  return valuesOf(step => microBatchesAt(accumulate, step) * factor, steps) as string
}

/** A setting of the model as the record has it; undefined for what cannot be compared. */
function recorded(value: unknown, steps: number): RunRecord[string] | undefined {
  if (typeof value === 'function') {
    try {
      return valuesOf(value as Schedule, steps)
    } catch {
      // It takes something else than a step.
      return undefined
    }
  }
  return typeof value === 'object' ? JSON.stringify(value) : (value as RunRecord[string] | undefined)
}

/** What a function of the step gives over a run; undefined where it gives no numbers. */
function valuesOf(schedule: Schedule, steps: number): string | undefined {
  const values = Array.from({ length: steps }, (_, step) => schedule(step))
  return values.every(value => typeof value === 'number') ? `a schedule (${digest(values.join())})` : undefined
}

const digest = (text: string) => createHash('sha256').update(text).digest('hex').slice(0, 16)
