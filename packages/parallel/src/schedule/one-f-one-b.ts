/** @file 1F1B (Narayanan et al. 2019, "PipeDream"; 2021 for several stages per rank): keeps as few micro-batches in flight as fill the pipeline. */
import type { Action, PipelineSchedule } from './schedule.ts'
import { checkSizes } from './sizes.ts'

/**
 * 1F1B with one stage per rank: of p ranks, rank r runs p - 1 - r forward passes, then alternates one forward and one backward pass. Bubble (p - 1)(F + B), at most p - r micro-batches
 * in flight.
 * @throws MoeError E_CONFIG unless both sizes are positive integers
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
 * Interleaved 1F1B with several stages per rank: of p ranks, rank r holds stages r, r + p, r + 2p and so on. The bubble is that of 1F1B with the shorter passes of these smaller stages, at
 * the cost of more communication and more activations.
 * @param stagesPerRank v; the model has v p stages
 * @throws MoeError E_CONFIG unless all sizes are positive integers and the number of micro-batches is a multiple of p
 */
export function interleaved(ranks: number, microBatches: number, stagesPerRank: number): PipelineSchedule {
  checkSizes('interleaved 1F1B', { ranks, microBatches, stagesPerRank }, [
    [`microBatches is ${microBatches}, needs a multiple of ranks = ${ranks}`, microBatches % ranks !== 0],
  ])
  const passes = microBatches * stagesPerRank
  const group = ranks * stagesPerRank
  const actionsOf = (rank: number) => {
    // A group of p micro-batches passes through the rank's stages one after the other.
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
  const name = `interleaved 1F1B, ${stagesPerRank} stages per rank`
  return { name, stages: group, microBatches, ranks: Array.from({ length: ranks }, (_, r) => actionsOf(r)) }
}

/** `ahead` forward passes, then forward and backward passes alternating, then the remaining backward passes. */
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
