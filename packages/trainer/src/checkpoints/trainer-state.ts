/** @file `trainer.json`: the part of a checkpoint that is not tensors, and its comparison with the run that resumes. */
import { MoeError, type Random } from '@moe/core'

/**
 * All settings that determine the numbers of a run. Two runs with the same record, model and backend give the same bits
 * (on other ranks, the same up to rounding).
 */
export type RunRecord = Readonly<Record<string, string | number | boolean | null>>

/** The position of a random stream. */
export type StreamState = Pick<Random, 'seed' | 'stream' | 'position'>

export interface TrainerState {
  /** Steps done. The position in the schedule follows from it. */
  readonly step: number
  /** Rows of the data that these steps took, over all ranks; undefined for rollouts and preferences. */
  readonly rows?: number | undefined
  /** Positions trained on. */
  readonly tokens: number
  /** Seconds of training, excluding evaluation and saving. */
  readonly trainSeconds: number
  /** Peak memory of all processes of the run: see `TrainResult`. */
  readonly peakMemoryBytes: number
  readonly peakDeviceBytes: number
  /** `step` of the model, if it has one. */
  readonly modelStep?: number | undefined
  /** Names of the numbers that the model's `afterStep` returned, which tell them apart from those of its loss. */
  readonly balance?: readonly string[]
  /** Number of steps whose weights are averaged, if the run has `ema`. */
  readonly averagedSteps?: number | undefined
  /** Random streams of the model, by name. */
  readonly streams?: Readonly<Record<string, StreamState>>
  readonly run: RunRecord
}

const format = 'moe-trainer'
const version = 1

export function encodeTrainerState(state: TrainerState): string {
  return `${JSON.stringify({ format, version, ...state }, null, 2)}\n`
}

/** @throws MoeError E_CHECKPOINT if the text is not a complete state of this format */
export function decodeTrainerState(path: string, text: string): TrainerState {
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch (cause) {
    throw unreadable(path, `is not complete JSON (${(cause as Error).message})`, cause)
  }
  const state = (value ?? {}) as Partial<TrainerState> & { format?: unknown; version?: unknown }
  if (state.format !== format)
    throw unreadable(path, `is not a trainer state of this format (format ${JSON.stringify(state.format)})`)
  if (state.version !== version)
    throw unreadable(path, `has version ${JSON.stringify(state.version)}, but this trainer reads version ${version}`)
  const { step, tokens, trainSeconds, modelStep, balance = [], streams = {}, run } = state
  const { peakMemoryBytes = 0, peakDeviceBytes = 0, averagedSteps, rows } = state
  const counts = {
    step,
    tokens,
    trainSeconds,
    peakMemoryBytes,
    peakDeviceBytes,
    modelStep: modelStep ?? 0,
    averagedSteps: averagedSteps ?? 0,
    rows: rows ?? 0,
  }
  for (const [name, count] of Object.entries(counts)) {
    if (typeof count !== 'number' || !(count >= 0))
      throw unreadable(path, `has invalid ${name} ${JSON.stringify(count)}`)
  }
  if (!Number.isSafeInteger(step)) throw unreadable(path, `has invalid step ${step}`)
  if (!Array.isArray(balance)) throw unreadable(path, `has invalid balance ${JSON.stringify(balance)}`)
  if (typeof streams !== 'object' || streams === null || !Object.values(streams).every(isStream))
    throw unreadable(path, `has invalid streams ${JSON.stringify(streams)}`)
  if (typeof run !== 'object' || run === null) throw unreadable(path, 'does not contain the settings of the run')
  return {
    step: step as number,
    rows,
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

/** Labels of settings whose name alone says too little. */
const labels: Readonly<Record<string, string>> = { accumulate: 'accumulate (micro-batches per step, over all ranks)' }

/** @throws MoeError E_CHECKPOINT that lists every difference */
export function checkSameRun(path: string, stored: RunRecord, own: RunRecord): void {
  // Schedules are recorded as digests of their values over all steps, so with another number of steps they always
  // differ.
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
    problem: `the checkpoint is from a run with other settings:\n${differences.map(line => `  ${line}`).join('\n')}\n`,
    fix: 'use the same settings, or pass allowChanges: true to continue with the new ones; nothing was changed',
    details: { differences },
  })
}
