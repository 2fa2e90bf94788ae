/** @file New tokens of sequences that share a paged cache through the main model. */
import type { PagedBatch, PagedCache, PagedSequence } from '@moe/attention-mla'
import type { Precision, Tensor } from '@moe/core'
import { CachedPasses } from './cached-passes.ts'
import type { DeepSeek } from './model.ts'
import { isDrawn, probabilitiesOf, type SamplingOptions, type Scores, scoresOf } from './sampling.ts'

type Out = {
  /** The likeliest tokens, `i32 [B, 1, 1]`. Where nothing is asked for, the hidden states. */
  readonly best: Tensor
  /** `[B, 1, V]`, at the temperature of each sequence. */
  readonly probabilities?: Tensor
  /** `[B, 1, V]`, for penalties. */
  readonly logits?: Tensor
}

/** What the sequences of a pass want to know of what follows. */
interface Wanted {
  readonly scores: boolean
  readonly probabilities: boolean
  readonly logits: boolean
}

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
    options?: readonly SamplingOptions[],
  ): Promise<Scores[]> {
    const batch = this.#cache.batch(sequences)
    let passes = this.#passes.get(batch)
    if (passes === undefined) {
      passes = new CachedPasses<Out>(this.#model, batch, this.#precision)
      this.#passes.set(batch, passes)
    }
    const penalized = (each: SamplingOptions) => (each.repetitionPenalty ?? 1) !== 1
    const drawn = (each: SamplingOptions) => !penalized(each) && isDrawn(each)
    const wanted = {
      scores: options !== undefined,
      probabilities: options?.some(drawn) ?? false,
      logits: options?.some(penalized) ?? false,
    }
    const numbers = Float32Array.from(options ?? [], each => (drawn(each) ? 1 / (each.temperature as number) : 1))
    const out = passes.run(
      JSON.stringify(wanted),
      (input, _states, scales) => this.#pass(batch, input, scales, wanted),
      Int32Array.from(ids),
      wanted.probabilities ? { numbers } : {},
    )
    const tensors = [out.best, out.probabilities, out.logits]
    try {
      if (options === undefined) return []
      const [best, probabilities, logits] = await Promise.all(tensors.map(tensor => tensor?.values()))
      return options.map((each, i) => {
        const rows = (penalized(each) ? logits : drawn(each) ? probabilities : undefined) as Float32Array | undefined
        if (rows === undefined) return (best as Int32Array)[i]
        const size = rows.length / options.length
        return rows.subarray(i * size, (i + 1) * size)
      })
    } finally {
      for (const tensor of tensors) tensor?.dispose()
    }
  }

  #pass(batch: PagedBatch, ids: Tensor, scales: Tensor | undefined, wanted: Wanted): Out {
    const hidden = this.#model.hidden(ids, { cache: batch })
    if (!wanted.scores) return { best: hidden }
    const time = ids.shape[1]
    const logits = this.#model.lm_head.forward(hidden.narrow(1, time - 1, time))
    return {
      best: scoresOf(logits, {}),
      ...(scales && { probabilities: probabilitiesOf(logits, scales.reshape([batch.batch, 1, 1])) }),
      ...(wanted.logits && { logits }),
    }
  }

  dispose(): void {
    for (const passes of this.#passes.values()) passes.dispose()
    this.#passes.clear()
  }
}
