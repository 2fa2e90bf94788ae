/** @file How long a schedule takes, where its ranks wait, and what they hold, for given durations. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import { type Action, checkSchedule, inOrder, type PipelineSchedule, partsOf, stagesOf } from './schedule.ts'

/** Any unit of time, of one micro-batch in one stage. */
export interface Durations {
  /** F. Default 1. */
  readonly forward?: number
  /** B, input and weights together. Default 2. */
  readonly backward?: number
  /** W, the weights' part of B. Default half of B. */
  readonly backwardWeight?: number
  /** F&B, a forward and a backward pass overlapped. Default F + B: nothing is gained. */
  readonly overlapped?: number
  /** From the end of a pass on one rank to when another has what it needs of it. Default 0. */
  readonly communication?: number
}

const names: OptionNames<Durations> = {
  forward: true,
  backward: true,
  backwardWeight: true,
  overlapped: true,
  communication: true,
}

/** An action with its time, in the unit of the durations. */
export interface TimedAction {
  /** What is done. */
  readonly action: Action
  /** From the beginning of the step. */
  readonly start: number
  /** From the beginning of the step. */
  readonly end: number
}

/** One rank of a simulated step. */
export interface RankSimulation {
  /** Its actions, in order. */
  readonly timeline: readonly TimedAction[]
  /** Time that it computes. */
  readonly busy: number
  /** Time that it does not, of the whole makespan. */
  readonly bubble: number
  /** Time that it waits between its first and its last action. */
  readonly idle: number
  /** Stages whose parameters it holds. */
  readonly stages: number
  /** Most activations at once: passes that went forward and whose input gradient is not there yet. */
  readonly activations: number
  /** The same with those that are held, in part, for a weight gradient that was put off. */
  readonly held: number
}

/** A simulated step. */
export interface Simulation {
  /** The schedule that was simulated. */
  readonly schedule: PipelineSchedule
  /** From the first action of all ranks to the end of the last. */
  readonly makespan: number
  /** By rank. */
  readonly ranks: readonly RankSimulation[]
}

/**
 * Runs a schedule on paper: every rank does its actions in order, each as soon as the rank is free and what it needs has come.
 * @throws MoeError E_CONFIG for what `checkSchedule` finds, and for durations that cannot be
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

/** An action takes its activations when it begins, and gives back what it used when it is done. */
function peaksOf(timeline: readonly TimedAction[]): { activations: number; held: number } {
  let [alive, putOff, activations, held] = [0, 0, 0, 0]
  for (const { action } of timeline) {
    const kinds = partsOf(action).map(({ kind }) => kind)
    if (kinds.includes('forward')) alive++
    activations = Math.max(activations, alive)
    held = Math.max(held, alive + putOff)
    if (kinds.includes('backward') || kinds.includes('backwardInput')) alive--
    if (kinds.includes('backwardInput')) putOff++
    if (kinds.includes('backwardWeight')) putOff--
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
          : `backwardWeight = ${backwardWeight} is longer than backward = ${backward}, of which it is a part`,
      fix: 'durations are finite and not negative',
      details: given,
    })
  }
  const times = { forward, backward, backwardInput: backward - backwardWeight, backwardWeight, overlapped }
  return ({ kind }) => times[kind]
}
