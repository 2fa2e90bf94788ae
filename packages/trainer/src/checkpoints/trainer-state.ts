/**
 * @file `trainer.json`: what a checkpoint holds beside tensors, and how it is compared with the run that wants to go
 * on from it.
 */
import { MoeError, type Random } from '@moe/core'

/**
 * Everything that decides which numbers a run gives. Two runs with the same record, model and backend give the same
 * bits, and on other ranks the same but for rounding.
 */
export type RunRecord = Readonly<Record<string, string | number | boolean | null>>

/** Where a stream of random numbers is. */
export type StreamState = Pick<Random, 'seed' | 'stream' | 'position'>

export interface TrainerState {
  /** Steps done. The place in the data and the schedule follow from it. */
  readonly step: number
  /** Positions trained on. */
  readonly tokens: number
  /** Seconds of training, without evaluation and saving. */
  readonly trainSeconds: number
  /** Most memory so far, of all processes of the run: see `TrainResult`. */
  readonly peakMemoryBytes: number
  readonly peakDeviceBytes: number
  /** `step` of the model, where it counts for itself. */
  readonly modelStep?: number | undefined
  /** Names of what the model's `afterStep` returned: the other numbers of its log are those of the loss. */
  readonly balance?: readonly string[]
  /** Steps whose weights are in the averages, where there are some. */
  readonly averagedSteps?: number | undefined
  /** Streams that the model draws from, by name. */
  readonly streams?: Readonly<Record<string, StreamState>>
  readonly run: RunRecord
}

const format = 'moe-trainer'
const version = 1

export function encodeTrainerState(state: TrainerState): string {
  return `${JSON.stringify({ format, version, ...state }, null, 2)}\n`
}

/** @throws MoeError E_CHECKPOINT when the text is not a whole state of this format */
export function decodeTrainerState(path: string, text: string): TrainerState {
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch (cause) {
    throw unreadable(path, `is not whole JSON (${(cause as Error).message})`, cause)
  }
  const state = (value ?? {}) as Partial<TrainerState> & { format?: unknown; version?: unknown }
  if (state.format !== format)
    throw unreadable(path, `is not a state of this trainer (format ${JSON.stringify(state.format)})`)
  if (state.version !== version)
    throw unreadable(path, `has version ${JSON.stringify(state.version)}, this trainer reads ${version}`)
  const { step, tokens, trainSeconds, modelStep, balance = [], streams = {}, run } = state
  const { peakMemoryBytes = 0, peakDeviceBytes = 0, averagedSteps } = state
  const counts = {
    step,
    tokens,
    trainSeconds,
    peakMemoryBytes,
    peakDeviceBytes,
    modelStep: modelStep ?? 0,
    averagedSteps: averagedSteps ?? 0,
  }
  for (const [name, count] of Object.entries(counts)) {
    if (typeof count !== 'number' || !(count >= 0)) throw unreadable(path, `has ${name} ${JSON.stringify(count)}`)
  }
  if (!Number.isSafeInteger(step)) throw unreadable(path, `has step ${step}`)
  if (!Array.isArray(balance)) throw unreadable(path, `has balance ${JSON.stringify(balance)}`)
  if (typeof streams !== 'object' || streams === null || !Object.values(streams).every(isStream))
    throw unreadable(path, `has streams ${JSON.stringify(streams)}`)
  if (typeof run !== 'object' || run === null) throw unreadable(path, 'has no settings of the run')
  return {
    step: step as number,
    tokens: tokens as number,
    trainSeconds: trainSeconds as number,
    peakMemoryBytes,
    peakDeviceBytes,
    modelStep,
    balance,
    averagedSteps,
    streams,
    run,
  }
}

const isStream = (value: Partial<StreamState> | null) =>
  [value?.seed, value?.stream, value?.position].every(Number.isSafeInteger)

const unreadable = (path: string, problem: string, cause?: unknown) =>
  new MoeError({
    code: 'E_CHECKPOINT',
    op: path,
    problem,
    fix: 'resume from another checkpoint of the run; nothing was changed',
    cause,
  })

/** How differences are told, where the name alone says too little. */
const labels: Readonly<Record<string, string>> = { accumulate: 'accumulate (micro-batches of a step, of all ranks)' }

/** @throws MoeError E_CHECKPOINT that lists every difference */
export function checkSameRun(path: string, stored: RunRecord, own: RunRecord): void {
  // Schedules are recorded by their values over all steps: over another number of steps they differ in any case.
  const isSchedule = (value: unknown) => String(value).startsWith('a schedule')
  const follows = (key: string) => stored['steps'] !== own['steps'] && isSchedule(stored[key]) && isSchedule(own[key])
  const keys = [...new Set([...Object.keys(stored), ...Object.keys(own)])].filter(key => !follows(key))
  const show = (value: unknown) => (value === undefined ? 'nothing' : String(value))
  const differences = keys
    .filter(key => stored[key] !== own[key])
    .map(key => `${labels[key] ?? key}: saved with ${show(stored[key])}, now ${show(own[key])}`)
  if (differences.length === 0) return
  throw new MoeError({
    code: 'E_CHECKPOINT',
    op: path,
    problem: `it belongs to a run with other settings, so that going on would not continue it:\n${differences.map(line => `  ${line}`).join('\n')}\n`,
    fix: 'use the same settings, or pass allowChanges: true to go on with the new ones; nothing was changed',
    details: { differences },
  })
}
