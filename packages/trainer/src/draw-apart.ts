/** @file What a model draws while several ranks train it. */
import { type Module, namedStreams } from '@moe/core'
import type { Ranks } from './ranks.ts'

/**
 * Lets each rank draw numbers of its own from the streams of a model. The model's own streams are those of rank 0, which checkpoints have: those of the others follow from them.
 * @returns puts the model's own in their place again, as far on as they are: ranks have as many tokens, and draw as often
 */
export function drawApart({ rank }: Ranks, model: Module): () => void {
  const streams = rank === 0 ? [] : namedStreams(model).map(({ random }) => ({ random, own: random.stream }))
  for (const { random } of streams) random.stream = random.fork(`rank ${rank}`).stream
  return () => {
    for (const { random, own } of streams) random.stream = own
  }
}
