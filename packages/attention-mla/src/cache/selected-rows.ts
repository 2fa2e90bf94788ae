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

/** Selects rows of a layer for the new tokens of a step. The new rows and index keys must have been written. */
export class SelectedRows {
  /** All rows as pages of one row, `[rows, 1, features]`, for `latentAttention`. */
  readonly pool: Tensor
  readonly #step: CacheStep
  readonly #time: number
  readonly #count: number
  readonly #keys: Tensor
  readonly #rowOf: Tensor
  readonly #firstOf: Tensor

  /**
   * @param time number of new tokens per sequence
   * @param count number of rows to select for each, K
   * @param within S, at least the length of the longest sequence
   */
  constructor(cache: SequenceCache, layer: number, step: CacheStep, time: number, count: number, within: number) {
    const { batch, capacity, backend, features } = cache
    const rowOf_BS = step.positionRows()
    const stored = cache.rows(layer, 'index')
    const keys =
      step.pages === undefined ? stored.narrow(1, 0, within) : flat(stored).takeRows(rowOf_BS.narrow(1, 0, within))
    this.pool = flat(cache.rows(layer)).reshape([-1, 1, features])
    this.#step = step
    this.#time = time
    this.#count = count
    this.#keys = keys.cast('f32')
    this.#rowOf = rowOf_BS.reshape([batch * capacity])
    this.#firstOf = arange(batch, { backend }).mul(capacity).reshape([batch, 1, 1])
  }

  /**
   * Selects rows for the new tokens from number `from` on, whose index queries are given. Returns `pages i32 [B * n, K]`
   * and `lengths i32 [B * n]`, the number of rows in use, as `latentAttention` expects them.
   */
  select(queries: IndexQueries, from: number): { readonly pages: Tensor; readonly lengths: Tensor } {
    const [batch, n] = queries.q.shape
    const { lengths: after } = this.#step
    // The number of keys that each query sees.
    const limits_BN = after
      .reshape([batch, 1])
      .add(arange(n, { backend: after.backend }).reshape([1, n]))
      .add(from + 1 - this.#time)
    const positions = bestKeys(queries, this.#keys, limits_BN, this.#count)
    const pages = this.#rowOf.takeRows(positions.add(this.#firstOf)).reshape([batch * n, this.#count])
    return { pages, lengths: limits_BN.reshape([batch * n]).minimum(this.#count) }
  }
}
