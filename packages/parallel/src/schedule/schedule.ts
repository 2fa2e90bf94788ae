/** @file A pipeline schedule as data: what every rank does, in which order; and the check that it can be done. */
import { MoeError } from '@moe/core'

/** One micro-batch in one stage of the model. Both count from 0. */
export interface StagePass {
  /** Stage of the model, from 0. */
  readonly stage: number
  /** Micro-batch of the step, from 0. */
  readonly microBatch: number
}

/**
 * One thing that a rank does. `backward` is the gradient of input and weights together; `backwardInput` is the part that the stage before waits for, and
 * `backwardWeight` the part that can be put off. `overlapped` is a forward and a backward pass of two micro-batches at once, each computing while the other communicates.
 */
export type Action =
  | (StagePass & { readonly kind: 'forward' | 'backward' | 'backwardInput' | 'backwardWeight' })
  | { readonly kind: 'overlapped'; readonly forward: StagePass; readonly backward: StagePass }

/**
 * What every rank does in a step, in order. Made by `oneForwardOneBackward`, `interleaved`, the zero-bubble and the dual-pipe functions, or by
 * hand.
 */
export interface PipelineSchedule {
  /** What it is called, for messages and drawings. */
  readonly name: string
  /** Stages of the model. */
  readonly stages: number
  /** Micro-batches of a step. */
  readonly microBatches: number
  /**
   * For each rank what it does, in order. A rank holds the stages that it has passes of; in bidirectional schedules two ranks hold the same stage, for different
   * micro-batches.
   */
  readonly ranks: ReadonlyArray<readonly Action[]>
}

/** What an action computes, as single passes; an overlapped pair is two. */
export function partsOf(action: Action): ReadonlyArray<Exclude<Action, { kind: 'overlapped' }>> {
  if (action.kind !== 'overlapped') return [action]
  return [
    { kind: 'forward', ...action.forward },
    { kind: 'backward', ...action.backward },
  ]
}

/** Stages that a rank holds, lowest first. */
export function stagesOf(schedule: PipelineSchedule, rank: number): number[] {
  const stages = new Set(schedule.ranks[rank].flatMap(partsOf).map(({ stage }) => stage))
  return [...stages].sort((a, b) => a - b)
}

/** `F2.0`: forward of micro-batch 2 in stage 0. B is a whole backward pass, I and W are its two parts, `F2.0+B0.1` is an overlapped pair. */
export function showAction(action: Action): string {
  const letters = { forward: 'F', backward: 'B', backwardInput: 'I', backwardWeight: 'W' }
  return partsOf(action)
    .map(({ kind, stage, microBatch }) => `${letters[kind]}${microBatch}.${stage}`)
    .join('+')
}

/**
 * Checks that every micro-batch goes forward and backward through every stage once, on one rank per stage, forward first and the weights' part last; that no weight
 * gradient is left over; and that no ranks wait for each other.
 * @throws MoeError E_CONFIG with every fault, or with who waits for what
 */
export function checkSchedule(schedule: PipelineSchedule): void {
  if (!Array.isArray(schedule?.ranks)) {
    const fix = 'pass one that was made: zeroBubbleH1(ranks, microBatches)'
    throw new MoeError({ code: 'E_CONFIG', op: 'checkSchedule', problem: 'this is no schedule', fix })
  }
  const problems = faultsOf(schedule)
  if (problems.length > 0) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: schedule.name,
      problem: `this is no schedule:\n${problems.map(line => `  ${line}`).join('\n')}\n`,
      fix: 'every micro-batch goes through every stage once, forward and then backward',
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
    for (const { kind, stage, microBatch } of actions.flatMap(partsOf)) {
      const name = `stage ${stage}, micro-batch ${microBatch}`
      const known = (n: number, end: number) => Number.isInteger(n) && n >= 0 && n < end
      if (!known(stage, stages) || !known(microBatch, microBatches)) {
        problems.push(`rank ${rank}: there is no ${name}, of ${stages} stages and ${microBatches} micro-batches`)
        continue
      }
      const before = done.get(name) ?? new Set()
      done.set(name, before)
      if (kind === 'forward') home.set(name, home.get(name) ?? rank)
      const missing = kind === 'forward' ? [] : kind === 'backwardWeight' ? ['backwardInput'] : ['forward']
      const excluded = kind === 'backwardInput' || kind === 'backwardWeight' ? 'backward' : 'backwardInput'
      if (before.has(kind) || (kind !== 'forward' && before.has(excluded))) {
        problems.push(`rank ${rank}: ${kind} of ${name} comes twice`)
      } else if (missing.some(other => !before.has(other)) || home.get(name) !== rank) {
        problems.push(`rank ${rank}: ${kind} of ${name} comes without ${missing[0]} on this rank before it`)
      }
      before.add(kind)
    }
  }
  for (let stage = 0; stage < stages; stage++) {
    for (let microBatch = 0; microBatch < microBatches; microBatch++) {
      const name = `stage ${stage}, micro-batch ${microBatch}`
      const passes = done.get(name) ?? new Set()
      if (!passes.has('forward')) problems.push(`no forward of ${name}`)
      else if (!passes.has('backward') && !passes.has('backwardInput')) problems.push(`no backward of ${name}`)
      else if (passes.has('backwardInput') && !passes.has('backwardWeight')) {
        problems.push(`the weight gradient of ${name} is left over`)
      }
    }
  }
  return problems
}

/** What a pass needs before it: a pass of another stage, which may be on another rank. */
function neededBy({ kind, stage, microBatch }: ReturnType<typeof partsOf>[number], stages: number): string[] {
  if (kind === 'forward') return stage === 0 ? [] : [`forward ${stage - 1} ${microBatch}`]
  if (kind === 'backwardWeight') return []
  return stage === stages - 1 ? [] : [`gradient ${stage + 1} ${microBatch}`]
}

/** Name of what a pass gives to other stages. */
function givenBy({ kind, stage, microBatch }: ReturnType<typeof partsOf>[number]): string {
  const what = kind === 'forward' ? 'forward' : kind === 'backwardWeight' ? 'weights' : 'gradient'
  return `${what} ${stage} ${microBatch}`
}

/** Internal. An action that was done: the rank that did it, and where what it needed came from. */
export interface Visit<T> {
  readonly rank: number
  readonly action: Action
  /** What was returned for the actions that this one needs of other stages, with their ranks. */
  readonly needs: ReadonlyArray<{ readonly rank: number; readonly result: T }>
}

/**
 * Internal. Visits all actions so that each comes after those of its rank before it and after those that it needs of other stages.
 * @throws MoeError E_CONFIG when ranks wait for each other
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
    return `rank ${rank} waits at ${showAction(ranks[rank][at[rank]])} for the ${what} of stage ${stage}, micro-batch ${microBatch}`
  })
  throw new MoeError({
    code: 'E_CONFIG',
    op: name,
    problem: `ranks wait for each other:\n${lines.map(line => `  ${line}`).join('\n')}\n`,
    fix: 'move what is waited for before what waits',
    details: { waiting },
  })
}
