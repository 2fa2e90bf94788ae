/** @file Random streams of a model that several ranks train together. */
import { type Module, namedStreams } from '@moe/core'
import type { Ranks } from './ranks.ts'

/**
 * Gives each rank its own random numbers. Rank 0 keeps the model's own streams, which checkpoints store; those of the
 * other ranks are derived from them.
 *
 * @returns restores the model's own streams at their current positions, which are the same on all ranks because all
 *   process equally many tokens
 */
export function useRankStreams({ rank }: Ranks, model: Module): () => void {
  const streams = rank === 0 ? [] : namedStreams(model).map(({ random }) => ({ random, own: random.stream }))
  for (const { random } of streams) random.stream = random.fork(`rank ${rank}`).stream
  return () => {
    for (const { random, own } of streams) random.stream = own
  }
}
