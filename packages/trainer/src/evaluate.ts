/** @file Loss and bits per byte on held-out text. */
import {
  checkOptions,
  eventLoopTurn,
  MoeError,
  noGrad,
  type OptionNames,
  type Precision,
  scope,
  withPrecision,
} from '@moe/core'
import { checkedLoss, checkModel } from './check-model.ts'
import { type EvaluationOptions, evaluationWindows } from './data/evaluation-windows.ts'
import type { TokenDataset } from './data/token-dataset.ts'
import type { TrainableModel } from './model.ts'

/** Windows, arithmetic and end of a measurement. */
export interface EvaluateOptions extends Omit<EvaluationOptions, 'lookahead'> {
  /** Arithmetic of matrix products. Default f32. */
  readonly precision?: Precision
  /** Stops between two batches; the promise then rejects with the signal's reason. */
  readonly signal?: AbortSignal
  /** Is told after each batch which share of the measurement is done. */
  readonly onProgress?: (done: number) => void
}

const names: OptionNames<EvaluateOptions> = {
  sequenceLength: true,
  batchSize: true,
  isolate: true,
  limit: true,
  precision: true,
  signal: true,
  onProgress: true,
}

/** What a measurement of held-out text came to. */
export interface Evaluation {
  /** Nats per predicted token. */
  readonly loss: number
  /**
   * Bits per UTF-8 byte of the text: all nats (those of end tokens included) / ln 2 / bytes of the text. An estimate
   * from the mean number of bytes per token when a limit left out part of the data. NaN where the data does not know
   * its bytes.
   */
  readonly bitsPerByte: number
  /** Tokens that were predicted. */
  readonly tokens: number
  /** Wall time of the measurement. */
  readonly seconds: number
  /** Mean reward of texts for held-out prompts, where the data is rollouts. The loss is that of these texts then. */
  readonly reward?: number
  /** Share of held-out pairs whose better text the model prefers more than the reference does, where the data is preferences. The loss is that of pairs then. */
  readonly preferred?: number
}

/**
 * Measures a model on held-out data with windows that overlap by half: each token is predicted once, with context. A
 * text token that nothing precedes (where the tokenizer has no begin token) is charged as a uniform choice from the
 * vocabulary.
 */
export async function evaluate(
  model: TrainableModel,
  data: TokenDataset,
  options: EvaluateOptions,
): Promise<Evaluation> {
  checkModel('evaluate', model)
  if (data?.tokens === undefined) {
    throw new MoeError({
      code: 'E_DATA',
      op: 'evaluate',
      problem: 'the data is no TokenDataset',
      fix: 'pass TokenDataset.fromTexts(texts, tokenizer)',
    })
  }
  checkOptions('evaluate', options, names)
  const { precision = 'f32', signal, onProgress, ...windows } = options
  const started = performance.now()
  let nats = 0
  let tokens = 0
  for (const { batch, from, done } of evaluationWindows(data, { ...windows, lookahead: model.lookahead })) {
    signal?.throwIfAborted()
    const { nll, count } = scope(() =>
      noGrad(() =>
        withPrecision(precision, () => {
          const output = checkedLoss(model.loss(batch, { training: false, from }))
          return { nll: output.nll, count: output.count }
        }),
      ),
    )
    nats += await nll.item()
    nll.dispose()
    tokens += count
    onProgress?.(done)
    await eventLoopTurn()
  }
  const share = data.predictable === 0 ? 0 : tokens / data.predictable
  const charged = nats + share * data.unpredictable * Math.log(data.vocabSize)
  const bytes = share * data.textBytes
  return {
    loss: tokens === 0 ? Number.NaN : nats / tokens,
    bitsPerByte: bytes === 0 ? Number.NaN : charged / Math.LN2 / bytes,
    tokens,
    seconds: (performance.now() - started) / 1000,
  }
}
