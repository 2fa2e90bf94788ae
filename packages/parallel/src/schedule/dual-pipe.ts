/** @file DualPipe (DeepSeek-V3 report 3.2.1, deepseek-ai/DualPipe) and DualPipeV: bidirectional schedules with overlapped forward and backward passes. */
import type { Action, PipelineSchedule, StagePass } from './schedule.ts'
import { checkSizes } from './sizes.ts'

/**
 * DualPipe: micro-batches enter at both ends of the pipeline. With p ranks, rank r holds stage r for the first half of the micro-batches and stage p - 1 - r for the second half, which runs in
 * the other direction. Bubble (p/2 - 1)(F&B + B - 3W), twice the parameters, p + 1 activations.
 * @throws MoeError E_CONFIG unless ranks and micro-batches are even and there are at least two micro-batches per rank
 */
export function dualPipe(ranks: number, microBatches: number): PipelineSchedule {
  checkSizes('DualPipe', { ranks, microBatches }, [
    [`ranks is ${ranks}, needs an even number`, ranks % 2 !== 0],
    [`microBatches is ${microBatches}, needs an even number`, microBatches % 2 !== 0],
    [`microBatches is ${microBatches}, needs at least 2 * ranks = ${2 * ranks}`, microBatches < 2 * ranks],
  ])
  const each = microBatches / 2
  const actionsOf = (rank: number) => {
    const mirrored = rank >= ranks / 2
    const depth = mirrored ? ranks - 1 - rank : rank
    // Slot 0 is the direction that comes from the nearer end.
    return dualPipePhases(depth, ranks / 2, each, (slot, k) => {
      const down = (slot === 0) !== mirrored
      return down ? { stage: rank, microBatch: k } : { stage: ranks - 1 - rank, microBatch: each + k }
    }).flat()
  }
  return { name: 'DualPipe', stages: ranks, microBatches, ranks: Array.from({ length: ranks }, (_, r) => actionsOf(r)) }
}

/**
 * DualPipeV: DualPipe folded onto half its ranks. With p ranks, rank r holds stages r and 2p - 1 - r, so that no parameter is held twice. For the same number of stages it has
 * DualPipe's bubble on half the ranks.
 * @throws MoeError E_CONFIG unless there are at least two micro-batches per rank
 */
export function dualPipeV(ranks: number, microBatches: number): PipelineSchedule {
  checkSizes('DualPipeV', { ranks, microBatches }, [
    [`microBatches is ${microBatches}, needs at least 2 * ranks = ${2 * ranks}`, microBatches < 2 * ranks],
  ])
  const actionsOf = (rank: number) =>
    dualPipePhases(rank, ranks, microBatches, (slot, microBatch) => ({
      stage: slot === 0 ? rank : 2 * ranks - 1 - rank,
      microBatch,
    })).flat()
  const name = 'DualPipeV'
  return { name, stages: 2 * ranks, microBatches, ranks: Array.from({ length: ranks }, (_, r) => actionsOf(r)) }
}

type Slot = 0 | 1

/**
 * Internal. The eight phases of a rank. A slot is one of the two directions; slot 0 is the one that enters at the nearer end.
 * @param depth distance of the rank from the end where slot 0 enters
 * @param depths the number of ranks from an end to the middle
 * @param each the number of micro-batches per slot
 * @param pass returns the k-th pass of a slot
 */
export function dualPipePhases(
  depth: number,
  depths: number,
  each: number,
  pass: (slot: Slot, k: number) => StagePass,
): Action[][] {
  const forwards = [0, 0]
  const backwards = [0, 0]
  /** Deferred weight gradients, first in, first out. */
  const queue: StagePass[] = []
  const nextForward = (slot: Slot) => pass(slot, forwards[slot]++)
  const nextBackward = (slot: Slot) => pass(slot, backwards[slot]++)
  const forward = (slot: Slot): Action => ({ kind: 'forward', ...nextForward(slot) })
  const backward = (slot: Slot): Action => ({ kind: 'backward', ...nextBackward(slot) })
  const pair = (f: Slot, b: Slot): Action => ({
    kind: 'overlapped',
    forward: nextForward(f),
    backward: nextBackward(b),
  })
  const input = (slot: Slot): Action => {
    const next = nextBackward(slot)
    queue.push(next)
    return { kind: 'backwardInput', ...next }
  }
  const weight = (): Action => ({ kind: 'backwardWeight', ...(queue.shift() as StagePass) })
  const times = (count: number, actions: (i: number) => Action[]) =>
    Array.from({ length: count }, (_, i) => actions(i)).flat()

  const above = depths - depth - 1
  const middle = depth === depths - 1
  // In phase 6, weight gradients are deferred from this pass on.
  const half = depth + 1
  return [
    times(2 * above, () => [forward(0)]),
    times(depth + 1, () => [forward(0), forward(1)]),
    times(above, () => [input(1), weight(), forward(1)]),
    times(each - 2 * depths + depth + 1, i => [
      // The middle ranks do not overlap the first pair: their partner waits for the forward pass.
      ...(i === 0 && middle ? [forward(0), backward(1)] : [pair(0, 1)]),
      pair(1, 0),
    ]),
    times(above, () => [backward(1), pair(1, 0)]),
    times(depth + 1, i => [2 * i < half ? backward(1) : input(1), 2 * i + 1 < half ? backward(0) : input(0)]),
    times(above, () => [weight(), input(0)]),
    times(depth + 1, () => [weight()]),
  ]
}
