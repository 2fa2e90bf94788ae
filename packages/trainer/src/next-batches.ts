/** @file The batches of the next step, read while the device computes. */
import type { BatchSource } from './batch-source.ts'
import type { TokenBatch } from './model.ts'
import type { RankGroup } from './rank-group.ts'

export class NextBatches {
  readonly #source: BatchSource
  readonly #group: RankGroup
  readonly #signal: AbortSignal
  /** What was read ahead. */
  ready: readonly TokenBatch[] | null = null

  /** @param group saves a checkpoint if data cannot be read */
  constructor(source: BatchSource, group: RankGroup, signal: AbortSignal) {
    this.#source = source
    this.#group = group
    this.#signal = signal
  }

  /** Reads the batches of a step, unless they depend on the weights. @returns false if that fails */
  readAhead(step: number): boolean {
    try {
      this.ready ??= this.#source.prefetch(step)
      return true
    } catch {
      return false
    }
  }

  /**
   * For all ranks, if `readAhead` failed on any: tries again.
   * @throws MoeError if it fails again, after saving a checkpoint
   */
  async readTogether(step: number): Promise<void> {
    await this.#group.all(this.#signal, async () => {
      this.ready ??= this.#source.prefetch(step)
      return []
    })
  }

  /**
   * The batches of a step; null if producing them was interrupted.
   * @throws MoeError if their data cannot be read, after saving a checkpoint
   */
  async take(step: number): Promise<readonly TokenBatch[] | null> {
    const { ready } = this
    this.ready = null
    if (ready !== null) return ready
    // Several ranks have read theirs already, unless they depend on the weights; then the source itself is a group's work.
    if (this.#group.size > 1) return this.#source.batches(step)
    const all = await this.#group.all(this.#signal, async () => [await this.#source.batches(step)])
    return all?.[0] ?? null
  }
}
