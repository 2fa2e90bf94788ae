/** @file For tests: a model with nonzero balance biases, and a tokenizer for it. */
import { fromHost } from '@moe/core'
import { type PreTokenizerName, trainBpe } from '@moe/tokenizer-bpe'
import { DeepSeek, type DeepSeekConfigInput } from '../index.ts'

export function modelOf(config: DeepSeekConfigInput): DeepSeek {
  const model = new DeepSeek(config, { seed: 3 })
  for (const [layer, { gate }] of model.moeLayers.entries()) {
    const bias = gate.e_score_correction_bias
    const values = Float32Array.from(
      { length: model.config.n_routed_experts ?? 0 },
      (_, i) => Math.sin(7 * i + layer) / 50,
    )
    bias?.assign(fromHost(values, [values.length], 'f32', model.backend))
  }
  return model
}

const text = 'The better angels of our nature: of the people, by the people, for the people, 1 234 567 times.'

/** A tokenizer with about 290 ids, of which 0 and 1 are special. */
export const tokenizerWith = (preTokenizer: PreTokenizerName) =>
  trainBpe([text], { vocabSize: 290, preTokenizer, specialTokens: ['<|end|>', '<|begin|>'], minFrequency: 1 })
