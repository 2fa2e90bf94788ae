/** @file Forward passes of the main model over the cache of a session. */
import type { KvCache } from '@moe/attention-mla'
import type { Precision, Tensor } from '@moe/core'
import { CachedPasses } from './cached-passes.ts'
import type { Network } from './network.ts'
import { needsLogits, type Scores, type Scoring, scoresOf } from './sampling.ts'

type States = {
  /** Hidden states of the new tokens, `[1, n, D]`. */
  readonly hidden: Tensor
  /** `scoresOf` the logits of the last `wanted` tokens. */
  readonly scores: Tensor
  /** `[wanted, V]`, if requested. */
  readonly logits?: Tensor
}

/** The result of a pass. The caller must dispose of the tensors before the next pass, which may overwrite them. */
interface Followed {
  /** `[1, n, D]`. */
  readonly hidden: Tensor
  readonly rows: Scores[]
  readonly logits?: Tensor
}

/** Forward passes of the main model in one session. */
export class DecodeStep {
  readonly #model: Network
  #scoring: Scoring = { vocabulary: 0 }
  readonly #passes: CachedPasses<States>

  constructor(model: Network, cache: KvCache, precision: Precision) {
    this.#model = model
    this.#passes = new CachedPasses(model, cache, precision)
  }

  /** Sets how the following passes are scored. Graphs recorded for another scoring are discarded. */
  set scoring(scoring: Scoring) {
    const { temperature, vocabulary } = this.#scoring
    const same =
      scoring.temperature === temperature &&
      scoring.vocabulary === vocabulary &&
      needsLogits(scoring) === needsLogits(this.#scoring)
    if (!same) this.#passes.dispose()
    this.#scoring = scoring
  }

  /** Appends tokens to the cache. Returns their hidden states, the scores after the last `wanted` of them and, on request, their logits. */
  async run(ids: readonly number[], wanted: number, withLogits = false): Promise<Followed> {
    const pass = { depth: 0, finish: (states: Tensor) => this.#finish(states, wanted, withLogits) }
    const { hidden, scores, logits } = await this.#passes.run(`${wanted} ${withLogits}`, pass, Int32Array.from(ids))
    let values: Awaited<ReturnType<Tensor['values']>>
    try {
      values = await scores.values()
    } catch (error) {
      hidden.dispose()
      logits?.dispose()
      throw error
    } finally {
      scores.dispose()
    }
    if (!(values instanceof Float32Array)) return { hidden, rows: Array.from(values), logits }
    const size = values.length / wanted
    const rows = Array.from({ length: wanted }, (_, i) => values.subarray(i * size, (i + 1) * size))
    return { hidden, rows, logits }
  }

  #finish(hidden: Tensor, wanted: number, withLogits: boolean): States {
    const length = hidden.shape[1]
    const logits = this.#model.lm_head.forward(hidden.narrow(1, length - wanted, length))
    const scores = scoresOf(logits, this.#scoring)
    return { hidden, scores, ...(withLogits && { logits: logits.reshape([wanted, logits.shape[2]]) }) }
  }

  dispose(): void {
    this.#passes.dispose()
  }
}
