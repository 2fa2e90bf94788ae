/** @file 1F1B (Narayanan et al. 2019, "PipeDream"; 2021 for several stages a rank): as few micro-batches under way as fill the pipeline. */
import type { Action, PipelineSchedule } from './schedule.ts'
import { checkSizes } from './sizes.ts'

/**
 * One stage a rank: rank r runs p - 1 - r forward passes, then one forward and one backward pass in turn. Bubble (p - 1)(F + B), at most p - r micro-batches alive.
 * @throws MoeError E_CONFIG
 */
export function oneForwardOneBackward(ranks: number, microBatches: number): PipelineSchedule {
  checkSizes('1F1B', { ranks, microBatches })
  const actionsOf = (rank: number) => {
    const pass =
      (kind: 'forward' | 'backward') =>
      (microBatch: number): Action => ({ kind, stage: rank, microBatch })
    return alternate(microBatches, ranks - 1 - rank, pass('forward'), pass('backward'))
  }
  return { name: '1F1B', stages: ranks, microBatches, ranks: Array.from({ length: ranks }, (_, r) => actionsOf(r)) }
}

/**
 * Several stages a rank: rank r holds stages r, r + p, r + 2p and so on. The bubble is that of 1F1B with passes of one of these smaller stages, for more communication
 * and more activations.
 * @param stagesPerRank v; the model has v p stages
 * @throws MoeError E_CONFIG, also when the micro-batches do not come in groups of p
 */
export function interleaved(ranks: number, microBatches: number, stagesPerRank: number): PipelineSchedule {
  checkSizes('interleaved 1F1B', { ranks, microBatches, stagesPerRank }, [
    [`microBatches = ${microBatches} is no multiple of ranks = ${ranks}`, microBatches % ranks !== 0],
  ])
  const passes = microBatches * stagesPerRank
  const group = ranks * stagesPerRank
  const actionsOf = (rank: number) => {
    // Groups of p micro-batches go through one stage of the rank after the other.
    const pass =
      (kind: 'forward' | 'backward') =>
      (k: number): Action => {
        const turn = Math.floor(k / ranks) % stagesPerRank
        const chunk = kind === 'forward' ? turn : stagesPerRank - 1 - turn
        return { kind, stage: chunk * ranks + rank, microBatch: Math.floor(k / group) * ranks + (k % ranks) }
      }
    const ahead = stagesPerRank === 1 ? ranks - 1 - rank : 2 * (ranks - 1 - rank) + (stagesPerRank - 1) * ranks
    return alternate(passes, ahead, pass('forward'), pass('backward'))
  }
  const name = `interleaved 1F1B, ${stagesPerRank} stages a rank`
  return { name, stages: group, microBatches, ranks: Array.from({ length: ranks }, (_, r) => actionsOf(r)) }
}

/** `ahead` forward passes, then forward and backward in turn, then what is left of the backward passes. */
function alternate(
  passes: number,
  ahead: number,
  forward: (k: number) => Action,
  backward: (k: number) => Action,
): Action[] {
  const first = Math.min(ahead, passes)
  const actions: Action[] = []
  for (let k = 0; k < first; k++) actions.push(forward(k))
  for (let k = 0; k < passes; k++) {
    if (first + k < passes) actions.push(forward(first + k))
    actions.push(backward(k))
  }
  return actions
}
