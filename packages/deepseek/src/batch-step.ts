/** @file New tokens of sequences that share a paged cache through the main model. */
import type { PagedBatch, PagedCache, PagedSequence } from '@moe/attention-mla'
import type { Precision, Tensor } from '@moe/core'
import { CachedPasses } from './cached-passes.ts'
import type { TurnOptions } from './generate.ts'
import type { DeepSeek } from './model.ts'
import { isDrawn, probabilitiesOf, type SamplingOptions, type Scores, scoresOf } from './sampling.ts'

type Out = {
  /** Hidden states of the new tokens, `[B, n, D]`. */
  readonly hidden: Tensor
  /** The likeliest tokens, `i32 [B, 1, 1]`. */
  readonly best?: Tensor
  /** `[B, 1, V]`, at the temperature of each sequence. */
  readonly probabilities?: Tensor
  /** `[B, V]`, for penalties and log-probabilities. */
  readonly logits?: Tensor
}

/** What follows new tokens. The tensors are the caller's, who frees them before the next run: that may overwrite them. */
interface Followed {
  readonly hidden: Tensor
  readonly logits?: Tensor
  /** Of each sequence, by its options. */
  readonly scores: readonly Scores[]
}

/** What the sequences of a pass want to know of what follows. */
interface Wanted {
  readonly scores: boolean
  readonly probabilities: boolean
  readonly logits: boolean
}

/** How what follows a sequence is scored. */
type Scoring = SamplingOptions & Pick<TurnOptions, 'logProbs'>

/** The passes of the main model over a paged cache. */
export class BatchStep {
  readonly #model: DeepSeek
  readonly #cache: PagedCache
  readonly #precision: Precision
  readonly #passes = new Map<PagedBatch, CachedPasses<Out>>()

  constructor(model: DeepSeek, cache: PagedCache, precision: Precision) {
    this.#model = model
    this.#cache = cache
    this.#precision = precision
  }

  /**
   * Adds as many tokens to each of the sequences, `ids` row by row, and gives what follows the last of each by its options; nothing where there are none. The
   * sequences have pages for it.
   */
  async run(
    sequences: readonly PagedSequence[],
    ids: readonly number[],
    options: readonly Scoring[],
  ): Promise<Followed> {
    const batch = this.#cache.batch(sequences)
    let passes = this.#passes.get(batch)
    if (passes === undefined) {
      passes = new CachedPasses<Out>(this.#model, batch, this.#precision)
      this.#passes.set(batch, passes)
    }
    const penalized = (each: Scoring) => (each.repetitionPenalty ?? 1) !== 1
    const drawn = (each: Scoring) => !penalized(each) && isDrawn(each)
    const wanted = {
      scores: options.length > 0,
      probabilities: options.some(drawn),
      logits: options.some(each => penalized(each) || each.logProbs !== undefined),
    }
    const numbers = Float32Array.from(options, each => (drawn(each) ? 1 / (each.temperature as number) : 1))
    const { hidden, best, probabilities, logits } = passes.run(
      JSON.stringify(wanted),
      (input, _states, scales) => this.#pass(batch, input, scales, wanted),
      Int32Array.from(ids),
      wanted.probabilities ? { numbers } : {},
    )
    try {
      const onHost = [best, probabilities, options.some(penalized) ? logits : undefined]
      const [likeliest, shares, raw] = await Promise.all(onHost.map(tensor => tensor?.values()))
      const scores = options.map((each, i) => {
        const rows = (penalized(each) ? raw : drawn(each) ? shares : undefined) as Float32Array | undefined
        if (rows === undefined) return (likeliest as Int32Array)[i]
        const size = rows.length / options.length
        return rows.subarray(i * size, (i + 1) * size)
      })
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

  #pass(batch: PagedBatch, ids: Tensor, scales: Tensor | undefined, wanted: Wanted): Out {
    const hidden = this.#model.hidden(ids, { cache: batch })
    if (!wanted.scores) return { hidden }
    const time = ids.shape[1]
    const logits = this.#model.lm_head.forward(hidden.narrow(1, time - 1, time))
    return {
      hidden,
      best: scoresOf(logits, {}),
      ...(scales && { probabilities: probabilitiesOf(logits, scales.reshape([batch.batch, 1, 1])) }),
      ...(wanted.logits && { logits: logits.reshape([batch.batch, logits.shape[2]]) }),
    }
  }

  dispose(): void {
    for (const passes of this.#passes.values()) passes.dispose()
    this.#passes.clear()
  }
}
