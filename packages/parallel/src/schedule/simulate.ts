/** @file Simulates the time, idle time and memory of a schedule for given durations. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import { type Action, checkSchedule, inOrder, type PipelineSchedule, partsOf, stagesOf } from './schedule.ts'

/** Durations of the passes of one micro-batch through one stage, in any unit of time. */
export interface Durations {
  /** F, the forward pass. Default: 1. */
  readonly forward?: number
  /** B, the full backward pass, for input and weights. Default: 2. */
  readonly backward?: number
  /** W, the part of B for the weights. Default: half of B. */
  readonly backwardWeight?: number
  /** F&B, an overlapped forward and backward pass. Default: F + B, no gain. */
  readonly overlapped?: number
  /** From the end of a pass on one rank until its result is available on another. Default: 0. */
  readonly communication?: number
}

const names: OptionNames<Durations> = {
  forward: true,
  backward: true,
  backwardWeight: true,
  overlapped: true,
  communication: true,
}

/** An action with its times, in the unit of the durations. */
export interface TimedAction {
  /** The action. */
  readonly action: Action
  /** Start, counted from the start of the step. */
  readonly start: number
  /** End, counted from the start of the step. */
  readonly end: number
}

/** One rank of a simulated step. */
export interface RankSimulation {
  /** The rank's actions, in order. */
  readonly timeline: readonly TimedAction[]
  /** The time spent computing. */
  readonly busy: number
  /** The rest of the makespan. */
  readonly bubble: number
  /** The part of the bubble between the rank's first and last action. */
  readonly idle: number
  /** The number of stages whose parameters the rank holds. */
  readonly stages: number
  /** The peak number of activations: forward passes whose input gradient is not computed yet. */
  readonly activations: number
  /** The peak number including activations that are held, in part, for a deferred weight gradient. */
  readonly held: number
}

/** The result of `simulate`. */
export interface Simulation {
  /** The simulated schedule. */
  readonly schedule: PipelineSchedule
  /** The duration of the step: from the first action on any rank to the end of the last. */
  readonly makespan: number
  /** The results of each rank. */
  readonly ranks: readonly RankSimulation[]
}

/**
 * Simulates a schedule without computing anything: every rank runs its actions in order, each as soon as the rank is free and the inputs have arrived.
 * @throws MoeError E_CONFIG if the schedule is invalid (see `checkSchedule`), or a duration is negative or not finite
 */
export function simulate(schedule: PipelineSchedule, durations: Durations = {}): Simulation {
  checkOptions('simulate', durations, names)
  const lasts = durationOf(durations)
  checkSchedule(schedule)
  const { communication = 0 } = durations
  const timelines = schedule.ranks.map((): TimedAction[] => [])
  inOrder<number>(schedule, ({ rank, action, needs }) => {
    const arrivals = needs.map(need => need.result + (need.rank === rank ? 0 : communication))
    const start = Math.max(0, timelines[rank].at(-1)?.end ?? 0, ...arrivals)
    const end = start + lasts(action)
    timelines[rank].push({ action, start, end })
    return end
  })
  const makespan = Math.max(0, ...timelines.map(timeline => timeline.at(-1)?.end ?? 0))
  const ranks = timelines.map((timeline, rank): RankSimulation => {
    const busy = timeline.reduce((sum, { start, end }) => sum + (end - start), 0)
    const span = timeline.length === 0 ? 0 : (timeline.at(-1) as TimedAction).end - timeline[0].start
    const stages = stagesOf(schedule, rank).length
    return { timeline, busy, bubble: makespan - busy, idle: span - busy, stages, ...peaksOf(timeline) }
  })
  return { schedule, makespan, ranks }
}

/** Activations are allocated at the start of an action and freed at its end. */
function peaksOf(timeline: readonly TimedAction[]): { activations: number; held: number } {
  let [alive, deferred, activations, held] = [0, 0, 0, 0]
  for (const { action } of timeline) {
    const kinds = partsOf(action).map(({ kind }) => kind)
    if (kinds.includes('forward')) alive++
    activations = Math.max(activations, alive)
    held = Math.max(held, alive + deferred)
    if (kinds.includes('backward') || kinds.includes('backwardInput')) alive--
    if (kinds.includes('backwardInput')) deferred++
    if (kinds.includes('backwardWeight')) deferred--
  }
  return { activations, held }
}

function durationOf(durations: Durations): (action: Action) => number {
  const { forward = 1, backward = 2, communication = 0 } = durations
  const { backwardWeight = backward / 2, overlapped = forward + backward } = durations
  const given = { forward, backward, backwardWeight, overlapped, communication }
  const wrong = Object.entries(given).filter(([, time]) => !(time >= 0 && Number.isFinite(time)))
  if (wrong.length > 0 || backwardWeight > backward) {
    const problems = wrong.map(([name, time]) => `${name} is ${time}`)
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'simulate',
      problem:
        problems.length > 0
          ? problems.join(', ')
          : `backwardWeight = ${backwardWeight} is longer than backward = ${backward}, which includes it`,
      fix: 'pass finite durations of at least 0, with backwardWeight at most backward',
      details: given,
    })
  }
  const times = { forward, backward, backwardInput: backward - backwardWeight, backwardWeight, overlapped }
  return ({ kind }) => times[kind]
}
