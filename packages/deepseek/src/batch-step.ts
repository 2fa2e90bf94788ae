/** @file Forward passes of the main model for sequences that share a paged cache. */
import type { PagedBatch } from '@moe/attention-mla'
import type { Precision, Tensor } from '@moe/core'
import { CachedPasses } from './cached-passes.ts'
import type { TurnOptions } from './generation.ts'
import type { Network } from './network.ts'
import {
  isDrawn,
  limitVocabulary,
  needsLogits,
  probabilitiesOf,
  type Scores,
  type Scoring,
  scoresOf,
} from './sampling.ts'

type Out = {
  /** Hidden states of the new tokens, `[B, n, D]`. */
  readonly hidden: Tensor
  /** The most likely token after each of the last w tokens, `i32 [B, w, 1]`. */
  readonly best?: Tensor
  /** `[B, w, vocabulary]`, at the temperature of each sequence. */
  readonly probabilities?: Tensor
  /** `[B * w, V]`, for penalties, constraints and log-probabilities. */
  readonly logits?: Tensor
}

/** The result of a pass. The caller must dispose of the tensors before the next pass, which may overwrite them. */
interface Followed {
  readonly hidden: Tensor
  readonly logits?: Tensor
  /** Scores of the next token after each of the last `rows` tokens, by sequence. */
  readonly scores: ReadonlyArray<readonly Scores[]>
}

/** The outputs that a pass must compute. */
interface Wanted {
  /** Number of last tokens whose next tokens are scored. */
  readonly rows: number
  readonly probabilities: boolean
  readonly logits: boolean
  /** Number of token ids that may be generated, the same for all sequences. */
  readonly vocabulary: number
}

/** The outputs that a sequence needs. */
type Asked = Scoring & Pick<TurnOptions, 'logProbs'>

/** Forward passes of the main model over a paged cache. */
export class BatchStep {
  readonly #model: Network
  readonly #precision: Precision
  readonly #passes = new Map<PagedBatch, CachedPasses<Out>>()

  constructor(model: Network, precision: Precision) {
    this.#model = model
    this.#precision = precision
  }

  /**
   * Appends tokens to all sequences, the same number to each (`ids` row by row), and scores the next token after each of the last `rows`. The sequences must have pages for them, and the same
   * vocabulary.
   */
  async run(batch: PagedBatch, ids: readonly number[], rows: number, options: readonly Asked[]): Promise<Followed> {
    let passes = this.#passes.get(batch)
    if (passes === undefined) {
      passes = new CachedPasses<Out>(this.#model, batch, this.#precision)
      this.#passes.set(batch, passes)
    }
    const drawn = (each: Asked) => !needsLogits(each) && isDrawn(each)
    const [{ vocabulary }] = options
    const wanted = {
      rows,
      vocabulary,
      probabilities: rows > 0 && options.some(drawn),
      logits: rows > 0 && options.some(each => needsLogits(each) || each.logProbs !== undefined),
    }
    const numbers = Float32Array.from(options, each => (drawn(each) ? 1 / (each.temperature as number) : 1))
    const { hidden, best, probabilities, logits } = await passes.run(
      JSON.stringify(wanted),
      { depth: 0, finish: (states, scales) => this.#finish(states, scales, wanted) },
      Int32Array.from(ids),
      wanted.probabilities ? { numbers } : {},
    )
    try {
      const onHost = [best, probabilities, options.some(needsLogits) ? logits : undefined]
      const [likeliest, shares, raw] = await Promise.all(onHost.map(tensor => tensor?.values()))
      const rowOf = (all: unknown, row: number, size: number) =>
        (all as Float32Array).subarray(row * size, row * size + vocabulary)
      const scoresAt = (each: Asked, row: number): Scores => {
        if (needsLogits(each)) return rowOf(raw, row, this.#model.config.vocab_size)
        return drawn(each) ? rowOf(shares, row, vocabulary) : (likeliest as Int32Array)[row]
      }
      const scores = options.map((each, b) => Array.from({ length: rows }, (_, i) => scoresAt(each, b * rows + i)))
      return { hidden, logits, scores }
    } catch (error) {
      hidden.dispose()
      logits?.dispose()
      throw error
    } finally {
      best?.dispose()
      probabilities?.dispose()
    }
  }

  #finish(hidden: Tensor, scales: Tensor | undefined, wanted: Wanted): Out {
    const { rows, vocabulary, logits: withLogits } = wanted
    if (rows === 0) return { hidden }
    const [batch, time] = hidden.shape
    const logits = this.#model.lm_head.forward(hidden.narrow(1, time - rows, time))
    const likely = limitVocabulary(logits, vocabulary)
    return {
      hidden,
      best: scoresOf(likely),
      ...(scales && { probabilities: probabilitiesOf(likely, scales.reshape([batch, 1, 1])) }),
      ...(withLogits && { logits: logits.reshape([batch * rows, logits.shape[2]]) }),
    }
  }

  dispose(): void {
    for (const passes of this.#passes.values()) passes.dispose()
    this.#passes.clear()
  }
}
