/** @file A pipeline schedule as data, the ordered actions of every rank, and its validation. */
import { MoeError } from '@moe/core'

/** One micro-batch in one stage of the model. */
export interface StagePass {
  /** The stage's number, from 0. */
  readonly stage: number
  /** The micro-batch's number in the step, from 0. */
  readonly microBatch: number
}

/**
 * One action of a rank. `backward` computes the gradients of input and weights together. Its two parts can be separate actions: `backwardInput`, which the previous stage waits
 * for, and `backwardWeight`, which can be deferred. `overlapped` is a forward and a backward pass of two micro-batches at the same time, each computing while the other communicates.
 */
export type Action =
  | (StagePass & { readonly kind: 'forward' | 'backward' | 'backwardInput' | 'backwardWeight' })
  | { readonly kind: 'overlapped'; readonly forward: StagePass; readonly backward: StagePass }

/**
 * The ordered actions of every rank in a step. Created by `oneForwardOneBackward`, `interleaved`, the zero-bubble and DualPipe functions, or
 * manually.
 */
export interface PipelineSchedule {
  /** A name for error messages. */
  readonly name: string
  /** The number of stages of the model. */
  readonly stages: number
  /** The number of micro-batches of a step. */
  readonly microBatches: number
  /**
   * The actions of each rank, in order. A rank holds the stages that it has passes of; in bidirectional schedules two ranks hold the same stage, for different
   * micro-batches.
   */
  readonly ranks: ReadonlyArray<readonly Action[]>
}

/** Returns the passes of an action: two for an overlapped pair, else the action itself. */
export function partsOf(action: Action): ReadonlyArray<Exclude<Action, { kind: 'overlapped' }>> {
  if (action.kind !== 'overlapped') return [action]
  return [
    { kind: 'forward', ...action.forward },
    { kind: 'backward', ...action.backward },
  ]
}

/** Returns the stages that a rank holds, lowest first. */
export function stagesOf(schedule: PipelineSchedule, rank: number): number[] {
  const stages = new Set(schedule.ranks[rank].flatMap(partsOf).map(({ stage }) => stage))
  return [...stages].sort((a, b) => a - b)
}

/** Formats an action: `F2.0` is the forward pass of micro-batch 2 in stage 0. `B` is a full backward pass, `I` and `W` are its parts for input and weights, `F2.0+B0.1` is an overlapped pair. */
export function showAction(action: Action): string {
  const letters = { forward: 'F', backward: 'B', backwardInput: 'I', backwardWeight: 'W' }
  return partsOf(action)
    .map(({ kind, stage, microBatch }) => `${letters[kind]}${microBatch}.${stage}`)
    .join('+')
}

/**
 * Validates a schedule. Every micro-batch must pass through every stage once, forward and then backward on the same rank; a deferred weight gradient must be computed after the input
 * gradient; and the ranks must not deadlock.
 * @throws MoeError E_CONFIG with a list of all faults, or with what each deadlocked rank waits for
 */
export function checkSchedule(schedule: PipelineSchedule): void {
  if (!Array.isArray(schedule?.ranks)) {
    const fix = 'pass a PipelineSchedule, for example zeroBubbleH1(ranks, microBatches)'
    throw new MoeError({ code: 'E_CONFIG', op: 'checkSchedule', problem: 'not a schedule', fix })
  }
  const problems = faultsOf(schedule)
  if (problems.length > 0) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: schedule.name,
      problem: `invalid schedule:\n${problems.map(line => `  ${line}`).join('\n')}\n`,
      fix: 'run every micro-batch through every stage once, forward and then backward',
      details: { problems },
    })
  }
  inOrder(schedule, () => {})
}

function faultsOf({ stages, microBatches, ranks }: PipelineSchedule): string[] {
  const problems: string[] = []
  const home = new Map<string, number>()
  const done = new Map<string, Set<string>>()
  for (const [rank, actions] of ranks.entries()) {
    for (const action of actions) {
      if (action.kind !== 'overlapped') continue
      const { forward, backward } = action
      if (forward.stage === backward.stage && forward.microBatch === backward.microBatch)
        problems.push(`rank ${rank}: ${showAction(action)} overlaps the two passes of one micro-batch`)
    }
    for (const { kind, stage, microBatch } of actions.flatMap(partsOf)) {
      const name = `stage ${stage}, micro-batch ${microBatch}`
      const known = (n: number, end: number) => Number.isInteger(n) && n >= 0 && n < end
      if (!known(stage, stages) || !known(microBatch, microBatches)) {
        problems.push(`rank ${rank}: ${name} is out of range for ${stages} stages and ${microBatches} micro-batches`)
        continue
      }
      const before = done.get(name) ?? new Set()
      done.set(name, before)
      if (kind === 'forward') home.set(name, home.get(name) ?? rank)
      const missing = kind === 'forward' ? [] : kind === 'backwardWeight' ? ['backwardInput'] : ['forward']
      const excluded = kind === 'backwardInput' || kind === 'backwardWeight' ? 'backward' : 'backwardInput'
      if (before.has(kind) || (kind !== 'forward' && before.has(excluded))) {
        problems.push(`rank ${rank}: duplicate ${kind} of ${name}`)
      } else if (missing.some(other => !before.has(other)) || home.get(name) !== rank) {
        problems.push(`rank ${rank}: ${kind} of ${name} without ${missing[0]} on this rank before it`)
      }
      before.add(kind)
    }
  }
  for (let stage = 0; stage < stages; stage++) {
    for (let microBatch = 0; microBatch < microBatches; microBatch++) {
      const name = `stage ${stage}, micro-batch ${microBatch}`
      const passes = done.get(name) ?? new Set()
      if (!passes.has('forward')) problems.push(`missing forward of ${name}`)
      else if (!passes.has('backward') && !passes.has('backwardInput')) problems.push(`missing backward of ${name}`)
      else if (passes.has('backwardInput') && !passes.has('backwardWeight')) {
        problems.push(`missing backwardWeight of ${name}`)
      }
    }
  }
  return problems
}

/** The results of other stages that a pass needs. */
function neededBy({ kind, stage, microBatch }: ReturnType<typeof partsOf>[number], stages: number): string[] {
  if (kind === 'forward') return stage === 0 ? [] : [`forward ${stage - 1} ${microBatch}`]
  if (kind === 'backwardWeight') return []
  return stage === stages - 1 ? [] : [`gradient ${stage + 1} ${microBatch}`]
}

/** The name of a pass's result, as in `neededBy`. */
function givenBy({ kind, stage, microBatch }: ReturnType<typeof partsOf>[number]): string {
  const what = kind === 'forward' ? 'forward' : kind === 'backwardWeight' ? 'weights' : 'gradient'
  return `${what} ${stage} ${microBatch}`
}

/** Internal. A visited action with its dependencies. */
export interface Visit<T> {
  readonly rank: number
  readonly action: Action
  /** The results of the visits to the actions of other stages that this one needs, and their ranks. */
  readonly needs: ReadonlyArray<{ readonly rank: number; readonly result: T }>
}

/**
 * Internal. Visits all actions in topological order: each after the previous actions of its rank and after those of other stages that it needs.
 * @throws MoeError E_CONFIG if the ranks deadlock
 */
export function inOrder<T>(schedule: PipelineSchedule, visit: (visit: Visit<T>) => T): void {
  const { ranks, stages, name } = schedule
  const at = ranks.map(() => 0)
  const given = new Map<string, { rank: number; result: T }>()
  const missing = (rank: number) => {
    const needs = partsOf(ranks[rank][at[rank]]).flatMap(part => neededBy(part, stages))
    return needs.filter(need => !given.has(need))
  }
  for (let moved = true; moved; ) {
    moved = false
    for (const rank of ranks.keys()) {
      while (at[rank] < ranks[rank].length && missing(rank).length === 0) {
        const action = ranks[rank][at[rank]]
        const parts = partsOf(action)
        const needs = parts.flatMap(part => neededBy(part, stages)).map(need => given.get(need) as Visit<T>['needs'][0])
        const result = visit({ rank, action, needs })
        for (const part of parts) given.set(givenBy(part), { rank, result })
        at[rank]++
        moved = true
      }
    }
  }
  const waiting = [...ranks.keys()].filter(rank => at[rank] < ranks[rank].length)
  if (waiting.length === 0) return
  const lines = waiting.map(rank => {
    const [need] = missing(rank)
    const [what, stage, microBatch] = need.split(' ')
    return `rank ${rank} waits in ${showAction(ranks[rank][at[rank]])} for the ${what} of stage ${stage}, micro-batch ${microBatch}`
  })
  throw new MoeError({
    code: 'E_CONFIG',
    op: name,
    problem: `ranks wait for each other:\n${lines.map(line => `  ${line}`).join('\n')}\n`,
    fix: 'reorder the actions such that each comes after those that it waits for',
    details: { waiting },
  })
}
