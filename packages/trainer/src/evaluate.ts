/** @file Loss and bits per byte on held-out text. */
import {
  checkOptions,
  MoeError,
  noGrad,
  type OptionNames,
  type Precision,
  scope,
  withPrecision,
  yieldToEventLoop,
} from '@moe/core'
import { checkedLoss, checkModel } from './check-model.ts'
import { type EvaluationBatch, type EvaluationOptions, evaluationWindowsWhere } from './data/evaluation-windows.ts'
import { namedStreams } from './data/token-data.ts'
import { isTokenStream, type TokenStream } from './data/token-stream.ts'
import type { TokenBatch, TrainableModel } from './model.ts'
import type { ModelOnRanks } from './model-on-ranks.ts'
import { RankGroup } from './rank-group.ts'

/** Options of `evaluate`. */
export interface EvaluateOptions extends Omit<EvaluationOptions, 'lookahead'> {
  /** Precision of matrix products. Default f32. */
  readonly precision?: Precision | undefined
  /** Stops the evaluation between two batches. The promise then rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined
  /** Called after each batch with the fraction of the evaluation that is done. */
  readonly onProgress?: ((done: number) => void) | undefined
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

/** The evaluation of one of several held-out streams. */
export type SourceEvaluation = Pick<Evaluation, 'loss' | 'bitsPerByte' | 'tokens'>

/** The result of an evaluation on held-out data. */
export interface Evaluation {
  /** Negative log-likelihood in nats per predicted token. */
  readonly loss: number
  /**
   * Bits per UTF-8 byte of the text: all nats (including those of end tokens) / ln 2 / bytes of the text. If a limit
   * left out part of the data, the bytes are estimated from the mean number of bytes per token. NaN if the data does
   * not record its bytes.
   */
  readonly bitsPerByte: number
  /** Number of tokens predicted. */
  readonly tokens: number
  /** Wall time of the evaluation. */
  readonly seconds: number
  /** The evaluation of each held-out stream by name, if there are several. */
  readonly sources?: Readonly<Record<string, SourceEvaluation>>
  /**
   * Mean reward of the texts sampled for held-out prompts, if the data is rollouts. `loss` is then the loss of these
   * texts.
   */
  readonly reward?: number
  /**
   * Fraction of held-out pairs whose chosen text the model prefers more strongly than the reference does, if the data
   * is preferences. `loss` is then the loss of the pairs.
   */
  readonly preferred?: number
}

/**
 * Evaluates a model on held-out data, with windows that overlap by half: each token is predicted once, with context. If
 * the tokenizer has no begin token, the first token of each document has nothing to be predicted from and is charged as
 * a uniform choice from the vocabulary. Several named streams are each evaluated (a limit is divided evenly among them)
 * and combined into an overall result.
 *
 * @throws MoeError E_DATA if `data` is not a token stream, or a record of them
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
      problem: 'the data is not a TokenDataset, and not token streams by name',
      fix: 'pass TokenDataset.fromTexts(texts, tokenizer), or the held-out part of tokenFiles(folder)',
    })
  }
  checkOptions('evaluate', options, names)
  const signal = options.signal ?? new AbortController().signal
  const evaluation = await evaluateOnRanks(model, streams, { ...options, signal, ranks: new RankGroup() })
  if (evaluation === null) throw signal.reason
  return evaluation
}

interface EvaluateOnRanksOptions extends EvaluateOptions {
  readonly signal: AbortSignal
  /** Each rank evaluates its share of the batches. */
  readonly ranks: RankGroup
  /** The model on ranks, if each has a part of it. */
  readonly onRanks?: ModelOnRanks | undefined
}

/**
 * Evaluates a model on ranks. The result is the same on all ranks. If each has the whole model, it is the same on any
 * number of ranks, bit for bit.
 * @returns null if it was interrupted on any rank
 */
export async function evaluateOnRanks(
  model: TrainableModel,
  streams: ReadonlyArray<readonly [name: string, stream: TokenStream]>,
  { precision = 'f32', ranks, onRanks, signal, onProgress, ...windows }: EvaluateOnRanksOptions,
): Promise<Evaluation | null> {
  const started = performance.now()
  const { limit } = windows
  const share = limit === undefined ? undefined : Math.max(1, Math.floor(limit / streams.length))
  const options = { ...windows, limit: share, lookahead: model.lookahead }
  const batches: HeldOutBatches = isWanted => batchesOf(streams, options, isWanted)
  const watch = { precision, ranks, signal, onProgress }
  const losses = await (onRanks ? lossesInParts(onRanks, batches, watch) : lossesOf(model, batches, watch))
  if (losses === null) return null
  // Added up in the order of the batches, so that the sums do not depend on the number of ranks.
  losses.sort((a, b) => a.index - b.index)
  const all = streams.map(([name, stream], at) => {
    const own = losses.filter(loss => loss.stream === at)
    return [name, stream, sourceEvaluation(stream, own)] as const
  })
  const seconds = (performance.now() - started) / 1000
  const [[only, , whole]] = all
  if (all.length === 1 && only === '') return { ...whole, seconds }
  // The others have no loss.
  const predicted = all.filter(([, , { tokens }]) => tokens > 0)
  const weighted = (value: 'loss' | 'bitsPerByte', weight: 'predictable' | 'textBytes') => {
    const sum = (of: (stream: TokenStream, evaluation: SourceEvaluation) => number) =>
      predicted.reduce((total, [, stream, evaluation]) => total + of(stream, evaluation), 0)
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

/** The loss of one batch of a held-out stream. */
interface BatchLoss {
  /** Position in the order of all batches of all streams. */
  readonly index: number
  readonly stream: number
  /** Negative log-likelihood in nats, summed over `count` tokens. */
  readonly nll: number
  readonly count: number
}

/** A batch of a held-out stream. */
interface HeldOutBatch extends EvaluationBatch {
  /** Position in the order of all batches of all streams. */
  readonly index: number
  readonly stream: number
}

/** Yields the batches whose index `isWanted` accepts. */
type HeldOutBatches = (isWanted: (index: number) => boolean) => Generator<HeldOutBatch>

function* batchesOf(
  streams: ReadonlyArray<readonly [name: string, stream: TokenStream]>,
  options: EvaluationOptions,
  isWanted: (index: number) => boolean,
): Generator<HeldOutBatch> {
  let next = 0
  for (const [at, [, stream]] of streams.entries())
    for (const { batch, from, done } of evaluationWindowsWhere(stream, options, () => isWanted(next++)))
      yield { index: next - 1, stream: at, batch, from, done: (at + done) / streams.length }
}

type Watch = Pick<EvaluateOnRanksOptions, 'ranks' | 'signal' | 'onProgress'> & { readonly precision: Precision }

/** The losses of all batches. Each rank evaluates its share with the whole model. */
function lossesOf(
  model: TrainableModel,
  batches: HeldOutBatches,
  { precision, ranks, signal, onProgress }: Watch,
): Promise<BatchLoss[] | null> {
  const own = async () => {
    const losses: BatchLoss[] = []
    for (const { index, stream, batch, from, done } of batches(index => index % ranks.size === ranks.rank)) {
      signal.throwIfAborted()
      losses.push({ index, stream, ...(await lossOf(model, batch, from, precision)) })
      onProgress?.(done)
      await yieldToEventLoop()
    }
    return losses
  }
  return ranks.all(signal, own, { save: false })
}

/** The same if each rank has a part of the model: all take part in every forward pass. */
async function lossesInParts(
  onRanks: ModelOnRanks,
  batches: HeldOutBatches,
  { precision, ranks, signal, onProgress }: Watch,
): Promise<BatchLoss[] | null> {
  let count = 0
  batches(() => count++ < 0).next()
  const { rank, world } = onRanks.dataShard
  const isOwn = (index: number) => index % world === rank
  // All need equally many: those with one batch less repeat the last one.
  const repeats = count % world > 0 && rank >= count % world
  const losses: BatchLoss[] = []
  const evaluate = async (together: readonly HeldOutBatch[]) => {
    const found = await onRanks.evaluate(together, { precision })
    for (const [i, { index, stream }] of together.entries()) {
      const loss = found[i]
      if (loss !== null && isOwn(index)) losses.push({ index, stream, ...loss })
    }
  }
  const isAborted = async () => (await ranks.gather(signal.aborted)).includes(true)
  let together: HeldOutBatch[] = []
  let left = Math.ceil(count / world)
  for (const each of batches(index => isOwn(index) || (repeats && index === count - 1))) {
    together.push(each)
    left--
    if (left > 0 && together.length < (onRanks.microBatches ?? 1)) continue
    if (await isAborted()) return null
    await evaluate(together)
    together = []
    onProgress?.(each.done)
    await yieldToEventLoop()
  }
  return (await ranks.gather(losses)).flat()
}

async function lossOf(
  model: TrainableModel,
  batch: TokenBatch,
  from: number,
  precision: Precision,
): Promise<Pick<BatchLoss, 'nll' | 'count'>> {
  const { nll, count } = scope(() =>
    noGrad(() =>
      withPrecision(precision, () => {
        const output = checkedLoss(model.loss(batch, { training: false, from }))
        return { nll: output.nll, count: output.count }
      }),
    ),
  )
  const value = await nll.item()
  nll.dispose()
  return { nll: value, count }
}

function sourceEvaluation(data: TokenStream, losses: readonly BatchLoss[]): SourceEvaluation {
  const nats = losses.reduce((sum, { nll }) => sum + nll, 0)
  const tokens = losses.reduce((sum, { count }) => sum + count, 0)
  const share = data.predictable === 0 ? 0 : tokens / data.predictable
  const charged = nats + share * data.unpredictable * Math.log(data.vocabSize)
  const bytes = share * data.textBytes
  return {
    loss: tokens === 0 ? Number.NaN : nats / tokens,
    bitsPerByte: bytes === 0 ? Number.NaN : charged / Math.LN2 / bytes,
    tokens,
  }
}
