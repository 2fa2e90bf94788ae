/** @file For tests: a small language model that implements the complete interface, its data, and temporary folders. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type Backend,
  crossEntropy,
  Embedding,
  forkInit,
  type InitOptions,
  isRecording,
  type Kernel,
  Linear,
  Module,
  noGrad,
  Parameter,
  Random,
  scope,
  type Tensor,
  tensor,
  zeros,
} from '@moe/core'
import { readF64, referenceBackend } from '@moe/core/reference'
import { TokenDataset } from './data/token-dataset.ts'
import type { LossOptions, LossOutput, TextTokenizer, TokenBatch, TrainableModel } from './model.ts'
import type { SamplingModel, TextSampler } from './rewards/sampler.ts'

export const testVocabulary = 12

/**
 * The reference backend with every f32 result rounded to f32, as on other backends. A checkpoint would not preserve its
 * float64 values.
 */
export function roundingBackend(): Backend {
  const backend = referenceBackend()
  const primitives = Object.entries(backend.primitives).map(([name, kernel]) => {
    const rounded: Kernel<never> = (inputs, attrs, outputs) => {
      const handles = (kernel as Kernel<never>)(inputs, attrs, outputs)
      handles.forEach((handle, i) => {
        const numbers = readF64({ ...outputs[i], handle })
        if (outputs[i].dtype === 'f32') for (let j = 0; j < numbers.length; j++) numbers[j] = Math.fround(numbers[j])
      })
      return handles
    }
    return [name, rounded]
  })
  return { ...backend, primitives: Object.fromEntries(primitives) as Backend['primitives'] }
}

/**
 * Predicts the next token from the current one. `offset` is a buffer that only `afterStep` changes, like the bias of a
 * router.
 */
export class BigramModel extends Module implements TrainableModel {
  readonly lookahead = 1
  readonly vocabSize = testVocabulary
  embed_tokens: Embedding
  lm_head: Linear
  offset: Parameter
  /** Batches seen with `training: true` since the last step. */
  #batches = 0

  constructor(init: InitOptions = {}) {
    super()
    const own = { std: 0.5, random: new Random(3), ...init }
    this.embed_tokens = new Embedding(testVocabulary, 6, forkInit(own, 'embed_tokens'))
    this.lm_head = new Linear(6, testVocabulary, forkInit(own, 'lm_head'))
    this.offset = new Parameter(zeros([testVocabulary], { backend: init.backend }), { trainable: false })
  }

  loss(batch: TokenBatch, { training = true, from = 0 }: LossOptions = {}): LossOutput {
    const { backend } = this.offset
    const { inputs, targets, weights, count } = nextTokens(batch, from)
    const embedded = this.embed_tokens.forward(tensor(inputs, [inputs.length], { backend }))
    const logits = this.lm_head.forward(this.hidden(embedded, training)).add(this.offset)
    const nlls = crossEntropy(logits, tensor(targets, [targets.length], { backend }))
    const sum = nlls.sum()
    const weighted = batch.weights ? nlls.mul(tensor(weights, [weights.length], { backend })).sum() : sum
    if (training && isRecording()) this.#batches++
    return {
      loss: weighted.mul(1 / Math.max(1, count)),
      nll: sum.detach(),
      nlls: nlls.detach(),
      count,
      metrics: { half: sum.detach().mul(0.5 / Math.max(1, count)) },
    }
  }

  /** Transforms the embeddings, `[N, 6]`, before the head. */
  protected hidden(embedded: Tensor, _training: boolean): Tensor {
    return embedded
  }

  async afterStep(): Promise<Record<string, number>> {
    const values = Float32Array.from(await this.offset.values(), (value, i) => value + (i % 2 ? 1e-2 : -1e-2))
    this.offset.assign(tensor(values, undefined, this.offset))
    const batches = this.#batches
    this.#batches = 0
    return { maxVio: values[1], batches }
  }
}

/** A model that also samples texts: each one separately, with the weights at its start. */
export class TalkingBigram extends BigramModel implements SamplingModel {
  /** The tokens of all sampled texts. */
  readonly sampledTexts: number[][] = []

  /** The probabilities of the next token after each token. */
  async table(): Promise<number[][]> {
    const logits = noGrad(() =>
      scope(() => {
        const ids = Int32Array.from({ length: testVocabulary }, (_, i) => i)
        const all = tensor(ids, [testVocabulary], { backend: this.offset.backend })
        return this.lm_head.forward(this.hidden(this.embed_tokens.forward(all), false)).add(this.offset)
      }),
    )
    const values = await logits.values()
    logits.dispose()
    return Array.from({ length: testVocabulary }, (_, row) => {
      const powers = Array.from(values.subarray(row * testVocabulary, (row + 1) * testVocabulary), Math.exp)
      const sum = powers.reduce((sum, x) => sum + x)
      return powers.map(x => x / sum)
    })
  }

  continuousBatch(): TextSampler {
    return {
      generate: (prompt, { maxTokens, seed, signal }) => {
        const logProbs: Array<{ token: number; logProb: number }> = []
        const stats: { finishReason: 'stop' | 'length' | null } = { finishReason: null }
        const random = new Random(seed)
        const make = async function* (model: TalkingBigram) {
          const table = await model.table()
          let at = prompt[prompt.length - 1]
          while (stats.finishReason === null) {
            signal.throwIfAborted()
            const drawn = random.next()
            let sum = 0
            const token = table[at].findIndex(p => {
              sum += p
              return drawn < sum
            })
            logProbs.push({ token, logProb: Math.log(table[at][token]) })
            at = token
            if (token === endToken) stats.finishReason = 'stop'
            else {
              yield token
              if (logProbs.length === maxTokens) stats.finishReason = 'length'
            }
          }
          model.sampledTexts.push(logProbs.map(({ token }) => token))
        }
        return { logProbs, stats, [Symbol.asyncIterator]: () => make(this) }
      },
      dispose() {},
    }
  }
}

/** The end token of `TalkingBigram`. */
const endToken = 11

/** Inputs, targets (-100 for positions without a loss), their weights and their number. */
export function nextTokens({ tokens, documents, weights: weightsOfTokens, rows, length }: TokenBatch, from: number) {
  const positions = length - 1
  const inputs = new Int32Array(rows * positions)
  const targets = new Int32Array(rows * positions).fill(-100)
  const weights = new Float32Array(rows * positions)
  let count = 0
  for (let row = 0; row < rows; row++) {
    for (let t = 0; t < positions; t++) {
      const at = row * length + t
      inputs[row * positions + t] = tokens[at]
      if (t < from || documents[at] !== documents[at + 1]) continue
      targets[row * positions + t] = tokens[at + 1]
      weights[row * positions + t] = weightsOfTokens?.[at + 1] ?? 1
      count++
    }
  }
  return { inputs, targets, weights, count }
}

/** Letters a to j, a begin and an end token. Unless told otherwise, it adds the begin token, as many tokenizers do. */
export const letters: TextTokenizer = {
  vocabSize: testVocabulary,
  encode: (text, { addSpecialTokens = true } = {}) => {
    const ids = Array.from(text, char => char.charCodeAt(0) - 97)
    return Uint32Array.from(addSpecialTokens ? [10, ...ids] : ids)
  },
  tokenToId: token => ({ '<s>': 10, '</s>': 11 })[token],
  decode: ids => Array.from(ids, id => (id < 10 ? String.fromCharCode(97 + id) : '')).join(''),
}

/** Documents of letters in which some pairs are frequent. */
export function letterTexts(documents: number, length: number, seed = 1): string[] {
  const random = new Random(seed)
  return Array.from({ length: documents }, () => {
    let at = random.integer(10)
    let text = ''
    for (let i = 0; i < length; i++) {
      text += String.fromCharCode(97 + at)
      at = random.next() < 0.8 ? (at * 3 + 1) % 10 : random.integer(10)
    }
    return text
  })
}

export const letterData = (documents = 20, length = 50) => ({
  training: TokenDataset.fromTexts(letterTexts(documents, length), letters),
  validation: TokenDataset.fromTexts(letterTexts(3, length, 2), letters),
})

const folders: string[] = []

/** Creates an empty folder, which `removeTemporaryFolders` removes. */
export async function temporaryFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'moe-trainer-'))
  folders.push(folder)
  return folder
}

export async function removeTemporaryFolders(): Promise<void> {
  for (const folder of folders.splice(0)) await rm(folder, { recursive: true, force: true })
}
