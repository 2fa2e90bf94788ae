/**
 * @file The cached rows that sparse attention reads: those of the keys with the best index scores.
 *
 * Legend: B batch, n queries per sequence, K selected keys, S positions among which to select.
 */
import { arange, type Tensor } from '@moe/core'
import { bestKeys, type IndexQueries } from '../lightning-indexer.ts'
import type { CacheStep, SequenceCache } from './sequence-cache.ts'

/** `[blocks, rows of a block, features]` to `[rows, features]`. */
const flat = (rows: Tensor): Tensor => rows.reshape([rows.shape[0] * rows.shape[1], rows.shape[2]])

/** The rows of a layer that the new tokens of a step read. The new rows and index keys must have been written. */
export class SelectedRows {
  /** All rows as pages of one row, `[rows, 1, features]`, for `latentAttention`. */
  readonly pool: Tensor
  readonly #cache: SequenceCache
  readonly #layer: number
  readonly #step: CacheStep
  readonly #count: number
  readonly #rowOf_BS: Tensor
  readonly #firstOf: Tensor
  /** The number of keys that each query sees. */
  readonly #limits_BT: Tensor

  /**
   * @param time number of new tokens per sequence
   * @param count number of rows that each reads, K
   */
  constructor(cache: SequenceCache, layer: number, time: number, count: number) {
    const { batch, capacity, backend, features } = cache
    this.pool = flat(cache.rows(layer)).reshape([-1, 1, features])
    this.#cache = cache
    this.#layer = layer
    this.#step = cache.next(time)
    this.#count = count
    this.#rowOf_BS = this.#step.positionRows()
    this.#firstOf = arange(batch, { backend }).mul(capacity).reshape([batch, 1, 1])
    this.#limits_BT = this.#step.lengths
      .reshape([batch, 1])
      .add(arange(time, { backend }).reshape([1, time]))
      .add(1 - time)
  }

  /**
   * Returns a function that selects keys for the new tokens `from` to `to - 1`, whose index queries are among `queries`:
   * positions `i32 [B, n, K]`, of which those that a token sees come first.
   * @param within S, at least the length of the longest sequence
   */
  selector({ q, weights }: IndexQueries, within: number): (from: number, to: number) => Tensor {
    const stored = this.#cache.rows(this.#layer, 'index')
    const ofSequences =
      this.#step.pages === undefined
        ? stored.narrow(1, 0, within)
        : flat(stored).takeRows(this.#rowOf_BS.narrow(1, 0, within))
    const keys = ofSequences.cast('f32')
    return (from, to) => {
      const queries = { q: q.narrow(1, from, to), weights: weights.narrow(1, from, to) }
      return bestKeys(queries, keys, this.#limits_BT.narrow(1, from, to), this.#count)
    }
  }

  /**
   * Returns where the selected positions `i32 [B, n, K]` of the new tokens from number `from` on are stored: `pages i32
   * [B * n, K]` and `lengths i32 [B * n]`, the number of rows in use, as `latentAttention` expects them.
   */
  read(selected: Tensor, from: number): { readonly pages: Tensor; readonly lengths: Tensor } {
    const [batch, n] = selected.shape
    const rowOf = this.#rowOf_BS.reshape([batch * this.#cache.capacity])
    const pages = rowOf.takeRows(selected.add(this.#firstOf)).reshape([batch * n, this.#count])
    const limits = this.#limits_BT.narrow(1, from, from + n)
    return { pages, lengths: limits.reshape([batch * n]).minimum(this.#count) }
  }
}
