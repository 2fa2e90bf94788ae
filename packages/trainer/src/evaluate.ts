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
import { namedStreams } from './data/mixture.ts'
import { isTokenStream, type TokenStream } from './data/token-stream.ts'
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

/** What the measurement of one of several held-out streams came to. */
export type SourceEvaluation = Pick<Evaluation, 'loss' | 'bitsPerByte' | 'tokens'>

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
  /** The same of each held-out stream by its name, where there are several. */
  readonly sources?: Readonly<Record<string, SourceEvaluation>>
  /** Mean reward of texts for held-out prompts, where the data is rollouts. The loss is that of these texts then. */
  readonly reward?: number
  /** Share of held-out pairs whose better text the model prefers more than the reference does, where the data is preferences. The loss is that of pairs then. */
  readonly preferred?: number
}

/**
 * Measures a model on held-out data with windows that overlap by half: each token is predicted once, with context. A
 * text token that nothing precedes (where the tokenizer has no begin token) is charged as a uniform choice from the
 * vocabulary. Of several streams by name, each is measured (a limit is shared out evenly) and the whole is what all of them together come to.
 */
export async function evaluate(
  model: TrainableModel,
  data: TokenStream | Readonly<Record<string, TokenStream>>,
  options: EvaluateOptions,
): Promise<Evaluation> {
  checkModel('evaluate', model)
  const streams = typeof data === 'object' && data !== null ? namedStreams(data) : []
  if (streams.length === 0 || !streams.every(([, stream]) => isTokenStream(stream))) {
    throw new MoeError({
      code: 'E_DATA',
      op: 'evaluate',
      problem: 'the data is no TokenDataset',
      fix: 'pass TokenDataset.fromTexts(texts, tokenizer), or the held-out part of tokenFiles(folder)',
    })
  }
  checkOptions('evaluate', options, names)
  const started = performance.now()
  const { limit, onProgress, ...rest } = options
  const share = limit === undefined ? undefined : Math.max(1, Math.floor(limit / streams.length))
  const all: [string, TokenStream, SourceEvaluation][] = []
  for (const [name, stream] of streams) {
    const before = all.length
    const told = onProgress && ((done: number) => onProgress((before + done) / streams.length))
    all.push([name, stream, await evaluateStream(model, stream, { ...rest, limit: share, onProgress: told })])
  }
  const [[only, , whole]] = all
  const seconds = (performance.now() - started) / 1000
  if (all.length === 1 && only === '') return { ...whole, seconds }
  const weighted = (value: 'loss' | 'bitsPerByte', weight: 'predictable' | 'textBytes') => {
    const sum = (of: (stream: TokenStream, evaluation: SourceEvaluation) => number) =>
      all.reduce((total, [, stream, evaluation]) => total + of(stream, evaluation), 0)
    return sum((stream, evaluation) => evaluation[value] * stream[weight]) / sum(stream => stream[weight])
  }
  return {
    loss: weighted('loss', 'predictable'),
    bitsPerByte: weighted('bitsPerByte', 'textBytes'),
    tokens: all.reduce((sum, [, , { tokens }]) => sum + tokens, 0),
    seconds,
    sources: Object.fromEntries(all.map(([name, , evaluation]) => [name, evaluation])),
  }
}

async function evaluateStream(
  model: TrainableModel,
  data: TokenStream,
  options: EvaluateOptions,
): Promise<SourceEvaluation> {
  const { precision = 'f32', signal, onProgress, ...windows } = options
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
  }
}
