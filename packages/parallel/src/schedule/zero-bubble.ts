/**
 * @file Zero-bubble schedules (Qi et al. 2024, "Zero Bubble Pipeline Parallelism"; "Pipeline Parallelism with Controllable Memory" for ZB-V): weight gradients are
 * deferred to fill the time in which a rank would wait.
 */
import type { Action, PipelineSchedule } from './schedule.ts'
import { checkSizes } from './sizes.ts'

/**
 * ZB-H1, also called ZB1P: 1F1B in which rank r defers r weight gradients. Every rank holds as many activations as the first rank of 1F1B. Bubble (p - 1)(F + B - 2W), where B is the
 * full backward pass.
 * @throws MoeError E_CONFIG unless both sizes are positive integers
 */
export function zeroBubbleH1(ranks: number, microBatches: number): PipelineSchedule {
  checkSizes('ZB-H1', { ranks, microBatches })
  return splitBackward('ZB-H1', ranks, microBatches, rank => ({ ahead: ranks - 1 - rank, deferred: rank }))
}

/**
 * ZB-H2: twice as many forward passes before the first backward pass, 2p - 1 on the first rank. If F = I = W, no rank waits between its first and its last action. Ranks start and end one
 * after the other, so the first passes of the next step could overlap with the last ones of this step if the optimizer did not wait for all ranks.
 * @throws MoeError E_CONFIG unless there are at least 2p - 1 micro-batches
 */
export function zeroBubbleH2(ranks: number, microBatches: number): PipelineSchedule {
  checkSizes('ZB-H2', { ranks, microBatches }, [
    [`microBatches is ${microBatches}, needs at least 2 * ranks - 1 = ${2 * ranks - 1}`, microBatches < 2 * ranks - 1],
  ])
  return splitBackward('ZB-H2', ranks, microBatches, rank => ({ ahead: 2 * (ranks - 1 - rank), deferred: 2 * rank }))
}

/** `ahead` forward passes, then F, I and W alternating, with W `deferred` micro-batches behind I. */
function splitBackward(
  name: string,
  ranks: number,
  microBatches: number,
  amounts: (rank: number) => { ahead: number; deferred: number },
): PipelineSchedule {
  const actionsOf = (rank: number) => {
    const { ahead, deferred } = amounts(rank)
    const pass = (kind: 'forward' | 'backwardInput' | 'backwardWeight', microBatch: number): Action[] =>
      microBatch >= 0 && microBatch < microBatches ? [{ kind, stage: rank, microBatch }] : []
    const actions = Array.from({ length: ahead }, (_, k) => pass('forward', k)).flat()
    for (let k = 0; k < microBatches + deferred; k++) {
      actions.push(...pass('forward', ahead + k), ...pass('backwardInput', k), ...pass('backwardWeight', k - deferred))
    }
    return actions
  }
  return { name, stages: ranks, microBatches, ranks: Array.from({ length: ranks }, (_, r) => actionsOf(r)) }
}

/**
 * ZB-V: of p ranks, rank r holds stages r and 2p - 1 - r, so that micro-batches pass down the ranks and up again, and the first rank computes the loss. If F = I = W, no rank
 * waits between its first and its last action, with the activation memory of 1F1B.
 * @throws MoeError E_CONFIG unless there are at least 2p - 1 micro-batches
 */
export function zeroBubbleV(ranks: number, microBatches: number): PipelineSchedule {
  checkSizes('ZB-V', { ranks, microBatches }, [
    [`microBatches is ${microBatches}, needs at least 2 * ranks - 1 = ${2 * ranks - 1}`, microBatches < 2 * ranks - 1],
  ])
  const actionsOf = (rank: number) => {
    const actions: Action[] = []
    const counts = { forward: [0, 0], backwardInput: [0, 0], backwardWeight: [0, 0] }
    const run = (kind: keyof typeof counts, leg: 0 | 1) => {
      actions.push({ kind, stage: leg === 0 ? rank : 2 * ranks - 1 - rank, microBatch: counts[kind][leg]++ })
    }
    const backward = (leg: 0 | 1) => {
      run('backwardInput', leg)
      run('backwardWeight', leg)
    }
    for (let i = 0; i < 2 * (ranks - rank) - 1; i++) run('forward', 0)
    for (let i = 0; i < rank; i++) {
      run('forward', 1)
      run('forward', 0)
    }
    for (let i = 0; i < ranks - rank; i++) {
      run('forward', 1)
      backward(1)
    }
    const { forward, backwardInput, backwardWeight } = counts
    while (forward[1] < forward[0] || forward[0] < microBatches) {
      if (forward[0] < microBatches) run('forward', 0)
      backward(0)
      run('forward', 1)
      backward(1)
    }
    for (let i = 0; i < rank; i++) {
      run('backwardInput', 0)
      run('backwardInput', 1)
    }
    for (let i = 0; i < ranks - rank; i++) {
      run('backwardInput', 0)
      run('backwardWeight', 0)
    }
    for (const leg of [1, 0] as const) while (backwardWeight[leg] < backwardInput[leg]) run('backwardWeight', leg)
    return actions
  }
  return { name: 'ZB-V', stages: 2 * ranks, microBatches, ranks: Array.from({ length: ranks }, (_, r) => actionsOf(r)) }
}
