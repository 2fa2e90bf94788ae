/** @file Where texts are sampled: on every rank, or, if each has a part of the model, on the ranks that lead. */
import type { ModelOnRanks } from '../model-on-ranks.ts'
import type { RankGroup } from '../rank-group.ts'
import type { TextSampler } from './sampler.ts'

/** Samples texts on ranks. All ranks make the same calls. */
export class Sampling {
  readonly #ranks: RankGroup
  readonly #onRanks: ModelOnRanks | undefined
  readonly #make: () => TextSampler
  #sampler: TextSampler | null = null
  /** The ranks whose texts this rank samples. */
  #own: { readonly from: number; readonly to: number } | null = null

  /** @param onRanks the model on ranks, if each has a part of it */
  constructor(ranks: RankGroup, onRanks: ModelOnRanks | undefined, make: () => TextSampler) {
    this.#ranks = ranks
    this.#onRanks = onRanks
    this.#make = make
  }

  /** This rank's share of `count` texts; none on ranks that do not lead. */
  async share(count: number): Promise<{ readonly from: number; readonly to: number }> {
    this.#own ??= await this.#sampledRanks()
    const { from, to } = this.#own
    return { from: this.#ranks.share(count, from).from, to: this.#ranks.share(count, to).from }
  }

  /**
   * Samples texts and gathers the results of all ranks, in the order of their shares; null if it was interrupted.
   *
   * @param work samples this rank's share
   */
  run<T>(signal: AbortSignal, work: (sampler: TextSampler) => Promise<readonly T[]>): Promise<T[] | null> {
    const sample = () => {
      this.#sampler ??= this.#make()
      return work(this.#sampler)
    }
    const led = async (): Promise<readonly T[]> => (await this.#onRanks?.lead?.(sample)) ?? []
    return this.#ranks.all(signal, this.#onRanks?.lead ? led : sample)
  }

  dispose(): void {
    this.#sampler?.dispose()
    this.#sampler = null
  }

  async #sampledRanks() {
    const { rank, size } = this.#ranks
    if (this.#onRanks?.lead === undefined) return { from: rank, to: rank + 1 }
    const leads = await this.#ranks.gather((await this.#onRanks.lead(async () => true)) ?? false)
    const next = leads.indexOf(true, rank + 1)
    return { from: rank, to: leads[rank] ? (next < 0 ? size : next) : rank }
  }
}
