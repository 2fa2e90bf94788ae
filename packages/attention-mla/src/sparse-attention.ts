/**
 * @file Attention over the keys that a lightning indexer selects, in multi-head form and with gradients (DeepSeek-V3.2
 * report 2.1). Queries are processed in chunks, so that memory does not grow with the square of the time.
 *
 * Legend: B batch, T time, S keys, H heads, D features of queries and keys, V of values; n queries of a chunk, K
 * selected keys. J and I: lightning-indexer.ts.
 */
import {
  arange,
  checkpoint,
  concat,
  customGradient,
  full,
  indexScores,
  isRecording,
  noGrad,
  ones,
  scope,
  setRows,
  softmax,
  type Tensor,
  where,
  zeros,
} from '@moe/core'
import type { IndexQueries } from './lightning-indexer.ts'

/** Maximum number of scores of a chunk: 64 MiB. Tests reduce it. */
export const limits = { scores: 2 ** 24 }

/** Returns the number of queries of a chunk, given the scores of each query. */
export const chunkSize = (scoresPerQuery: number): number => Math.max(1, Math.floor(limits.scores / scoresPerQuery))

/**
 * Minimum number of chunks of a sequence. A chunk computes no scores of keys after its last query, so four chunks
 * compute 5/8 of the scores of a single one.
 */
const leastChunks = 4

/** What the attention reads of the indexer: its queries, and the keys `[B, T, I]` of the same tokens. */
export interface IndexInputs extends IndexQueries {
  readonly keys: Tensor
}

interface SparseOptions {
  readonly scale: number
  /** Number of keys that a query attends to, K. */
  readonly count: number
  /** First key that each query sees, `i32 [B, T]`. */
  readonly starts: Tensor | undefined
  /** Attends to all keys instead of the best. */
  readonly dense: boolean
  /** Whether to compute the loss of the indexer, and record it for gradients. */
  readonly loss: boolean
  /** The keys that each query attends to, if they have been selected already: see `selectKeys`. */
  readonly selected: Tensor | undefined
}

/** The queries of each chunk. */
function chunksOf(time: number, scoresPerQuery: number): Array<readonly [from: number, to: number]> {
  const step = Math.min(chunkSize(scoresPerQuery), Math.ceil(time / leastChunks))
  return Array.from({ length: Math.ceil(time / step) }, (_, i) => [i * step, Math.min(time, (i + 1) * step)])
}

/**
 * Returns the positions of the `count` keys with the best index scores for each query, `i32 [B, T, K]`, for several
 * layers. Keys that the query must not see come last. Queries before number `count` get the first `count` positions.
 */
export function selectKeys(index: IndexInputs, count: number, starts: Tensor | undefined): Tensor {
  const { keys } = index
  const [batch, time] = keys.shape
  const parts = chunksOf(time, batch * time * index.q.shape[2]).map(([from, to]) =>
    scope(() => {
      if (to > count) {
        const own = (x: Tensor) => x.narrow(1, from, to)
        const scores = indexScores(own(index.q), own(index.weights), keys.narrow(1, 0, to))
        return bestOf(scores, visibleKeys(from, to, starts, keys), count)
      }
      const first = arange(count, { backend: keys.backend })
      return first.add(zeros([batch, to - from, count], { dtype: 'i32', backend: keys.backend }))
    }),
  )
  return concat(parts, 1)
}

/**
 * Causal attention of `q [B, T, H, D]` to `k [B, T, H, D]` and `v [B, T, H, V]` of the same tokens, each query to the
 * `count` keys with the best index scores, or to those of `selected`. Returns `[B, T, H, V]` and, if requested, the loss
 * `[B, T]` of the indexer: for each query, the divergence KL(p || softmax(index scores)) over the keys that it attends
 * to, where p is the mean of the attention probabilities of all heads, without gradient (eq. 4; with `dense`, eq. 3).
 * @param index may be undefined with `selected` and without the loss
 */
export function sparseAttention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  index: IndexInputs | undefined,
  options: SparseOptions,
): { readonly out: Tensor; readonly loss: Tensor | undefined } {
  const [batch, time, heads] = q.shape
  const chunks = chunksOf(time, batch * time * heads)
  const ofQueries = [q, ...(index ? [index.q, index.weights] : [])]
  const ofKeys = [byHead(k), byHead(v), ...(index ? [index.keys] : [])]
  const parts = isRecording() ? ofQueries.map(x => split(x, chunks)) : null
  const results = chunks.map(([from, to], i) => {
    const attend = (queries: readonly Tensor[], keys: readonly Tensor[]) =>
      attendChunk(queries, keys, from, to, options)
    if (parts === null)
      return scope(() =>
        attend(
          ofQueries.map(x => x.narrow(1, from, to)),
          ofKeys,
        ),
      )
    const queries = parts.map(ofChunks => ofChunks[i])
    return checkpoint(
      (...given) => attend(given.slice(0, queries.length), given.slice(queries.length)),
      ...queries,
      ...ofKeys,
    )
  })
  const [out, loss] = [0, 1].map(i => results.map(result => result[i]))
  return { out: concat(out, 1), loss: options.loss ? concat(loss, 1) : undefined }
}

const byHead = (x: Tensor) => x.permute([0, 2, 1, 3])

/**
 * Returns the queries of each chunk of `x [B, T, ...]`. The gradient concatenates theirs; `narrow` would pad each to all
 * queries, and the tape add them.
 */
const split = (x: Tensor, chunks: ReturnType<typeof chunksOf>): readonly Tensor[] =>
  customGradient(
    all => chunks.map(([from, to]) => all.narrow(1, from, to)),
    gradients => [concat([...gradients], 1)],
    x,
  )

/**
 * Attention of the queries `from` to `to - 1`: `[B, n, H, V]`, then the loss `[B, n]` if requested.
 * @param ofQueries q `[B, n, H, D]`, and queries and weights of the indexer
 * @param ofKeys k `[B, H, T, D]`, v, and keys of the indexer
 */
function attendChunk(
  [q, indexQ, weights]: readonly Tensor[],
  [k, v, indexKeys]: readonly Tensor[],
  from: number,
  to: number,
  options: SparseOptions,
): readonly Tensor[] {
  const { scale, count, dense, selected } = options
  const ranked = () => indexScores(indexQ, weights, indexKeys.narrow(1, 0, to))
  const index = options.loss ? ranked() : null
  const seen = noGrad(() => {
    const visible = visibleKeys(from, to, options.starts, q)
    if (dense || to <= count) return visible
    const best = selected?.narrow(1, from, to) ?? bestOf(index ?? ranked(), visible, count)
    return visible.mul(among(best, to))
  }).eq(1)
  const mask = (x: Tensor, allowed: Tensor) => where(allowed, x, full([], Number.NEGATIVE_INFINITY, x))
  const scores = byHead(q)
    .matmul(k.narrow(2, 0, to), { transposeB: true })
    .mul(scale)
  const [batch, time, keys] = seen.shape
  const p = softmax(mask(scores, seen.reshape([batch, 1, time, keys])))
  const out = byHead(p.matmul(v.narrow(2, 0, to)))
  if (index === null) return [out]
  const target = p.detach().mean(1)
  const masked = mask(index, seen)
  const shifted = index.sub(masked.detach().max(-1, true))
  const total = mask(shifted, seen).exp().sum(-1, true)
  const difference = target.maximum(1e-30).log().sub(shifted.sub(total.log()))
  return [out, target.mul(difference).sum(-1)]
}

/** 1 for the keys that a query may see: `i32 [B or 1, n, to]`. */
function visibleKeys(from: number, to: number, starts: Tensor | undefined, { backend }: Tensor): Tensor {
  const keys = arange(to, { backend })
  const causal = keys
    .reshape([1, 1, to])
    .le(keys.narrow(0, from, to).reshape([1, to - from, 1]))
    .cast('i32')
  if (starts === undefined) return causal
  const [batch] = starts.shape
  const first = starts.narrow(1, from, to).reshape([batch, to - from, 1])
  return causal.mul(first.le(keys.reshape([1, 1, to])).cast('i32'))
}

/** The positions of the `count` best keys of each query by `scores [B, n, S]`, those that are visible first. */
const bestOf = (scores: Tensor, visible: Tensor, count: number): Tensor =>
  where(visible.eq(1), scores, full([], Number.NEGATIVE_INFINITY, scores)).topk(count).indices

/** 1 for the keys at the positions `[B, n, K]`, of `keys` keys: `i32 [B, n, S]`. */
function among(positions: Tensor, keys: number): Tensor {
  const { backend } = positions
  const [batch, time, count] = positions.shape
  const queries = batch * time
  const rows = arange(queries, { backend }).mul(keys).reshape([queries, 1])
  const flat = positions
    .reshape([queries, count])
    .add(rows)
    .reshape([queries * count])
  const i32 = { dtype: 'i32', backend } as const
  const chosen = setRows(zeros([queries * keys], i32), flat, ones([queries * count], i32), { donate: true })
  return chosen.reshape([batch, time, keys])
}
