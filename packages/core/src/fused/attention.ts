/** @file Scaled dot-product attention with grouped key/value heads, and its absorbed form over a latent cache. */
import { attrError, needDtype, needShape } from '../checks.ts'
import { arange, full } from '../create.ts'
import type { AttentionAttrs, WidePrecision } from '../ops.ts'
import { checkOptions, type OptionNames } from '../options.ts'
import { widePrecision } from '../precision.ts'
import { where } from '../primitives.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'
import { rowMax } from './softmax.ts'

/** `[B, T, H, D]` to `[B, H, T, D]`. */
const headsFirst = (x: Tensor) => x.permute([0, 2, 1, 3])

/** Repeats key or value heads for every query head: `[B, S, G, D]` to `[B, H, S, D]`. */
function repeatHeads(x: Tensor, heads: number): Tensor {
  const [batch, size, groups, features] = x.shape
  const first = headsFirst(x)
  if (groups === heads) return first
  return first
    .reshape([batch, groups, 1, size, features])
    .expand([batch, groups, heads / groups, size, features])
    .reshape([batch, heads, size, features])
}

/** Sums query heads into their key/value head: `[B, H, S, D]` to `[B, S, G, D]`. */
function sumHeads(x: Tensor, groups: number): Tensor {
  const [batch, heads, size, features] = x.shape
  const summed = groups === heads ? x : x.reshape([batch, groups, heads / groups, size, features]).sum(2)
  return headsFirst(summed.reshape([batch, groups, size, features]))
}

/** Restricts which keys a query sees, in addition to causality. */
interface Seen {
  readonly lengths: Tensor | undefined
  readonly starts: Tensor | undefined
}

/** 1 where query i may see key j: `u8 [B or 1, 1, T or 1, S]`. */
function visible(q: Tensor, k: Tensor, { lengths, starts }: Seen, causal: boolean): Tensor {
  const { backend } = q
  const [batch, time] = q.shape
  const keys = k.shape[1]
  const key = arange(keys, { backend }).reshape([1, 1, 1, keys])
  const limit =
    lengths === undefined ? full([1, 1, 1, 1], keys, { dtype: 'i32', backend }) : lengths.reshape([batch, 1, 1, 1])
  const query = arange(time, { backend }).reshape([1, 1, time, 1])
  const conditions = [
    key.lt(limit),
    ...(causal ? [key.le(limit.add(query).sub(time))] : []),
    ...(starts === undefined ? [] : [starts.reshape([batch, 1, time, 1]).le(key)]),
  ]
  if (conditions.length === 1) return conditions[0]
  return conditions
    .map(condition => condition.cast('i32'))
    .reduce((all, condition) => all.mul(condition))
    .eq(1)
}

/** Scaled and masked scores `[B, H, T, S]`. */
function maskedScores(q: Tensor, k: Tensor, seen: Seen, attrs: AttentionAttrs): Tensor {
  const { precision, scale, causal } = attrs
  const scores = headsFirst(q).matmul(repeatHeads(k, q.shape[2]), { transposeB: true, precision }).mul(scale)
  return where(visible(q, k, seen, causal), scores, full([], Number.NEGATIVE_INFINITY, scores))
}

function inferAttention(op: string, q: Tensor, k: Tensor, v: Tensor, { lengths, starts }: Seen): void {
  for (const [name, value] of Object.entries({ q, k, v })) needDtype(op, name, value, 'f32')
  needShape(op, 'q', q, [-1, -1, -1, -1], 'pass q [B, T, H, Dk], k [B, S, G, Dk] and v [B, S, G, Dv]')
  const [batch, , heads, features] = q.shape
  needShape(op, 'k', k, [batch, -1, -1, features])
  needShape(op, 'v', v, [batch, k.shape[1], k.shape[2], -1])
  if (heads % k.shape[2] !== 0) needShape(op, 'k', k, [batch, -1, heads, features])
  if (lengths !== undefined) {
    needDtype(op, 'lengths', lengths, 'i32')
    needShape(op, 'lengths', lengths, [batch])
  }
  if (starts !== undefined) {
    needDtype(op, 'starts', starts, 'i32')
    needShape(op, 'starts', starts, [batch, q.shape[1]])
  }
}

export const attentionDefinition: FusedDefinition<'attention'> = {
  name: 'attention',
  infer([q, k, v, lengths, starts]) {
    inferAttention('attention', q, k, v, { lengths, starts })
    const [batch, time, heads] = q.shape
    return [
      { shape: [batch, time, heads, v.shape[3]], dtype: 'f32' },
      { shape: [batch, heads, time], dtype: 'f32' },
    ]
  },
  decompose([q, k, v, lengths, starts], attrs) {
    const scores = maskedScores(q, k, { lengths, starts }, attrs)
    const max = rowMax(scores)
    const e = scores.sub(max).exp()
    const total = e.sum(-1, true)
    const out = e.div(total.maximum(1e-37)).matmul(repeatHeads(v, q.shape[2]), { precision: attrs.precision })
    return [headsFirst(out), max.add(total.log()).reshape([q.shape[0], q.shape[2], q.shape[1]])]
  },
  vjp({ inputs: [q, k, v, ...seen], outputs: [out, lse], attrs }, [dout, dLse]) {
    if (dLse !== null) throw new Error('the log-sum-exp of attention carries no gradient')
    if (dout === null) return [null, null, null, null, null]
    return [...runFused(attentionBackwardDefinition, [q, k, v, out, lse, dout, ...seen], attrs), null, null]
  },
}

export const attentionBackwardDefinition: FusedDefinition<'attentionBackward'> = {
  name: 'attentionBackward',
  infer: ([q, k, v]) => [q, k, v],
  decompose([q, k, v, out, lse, dout, lengths, starts], attrs) {
    const { precision, scale } = attrs
    const heads = q.shape[2]
    const scores = maskedScores(q, k, { lengths, starts }, attrs)
    const perRow = lse.reshape([...lse.shape, 1])
    // Rows that see no key have lse -Infinity. Any finite number in its place leaves their probabilities 0.
    const finite = where(perRow.eq(Number.NEGATIVE_INFINITY), full([], 0, perRow), perRow)
    const p = scores.sub(finite).exp()
    const dOut = headsFirst(dout)
    const dv = p.matmul(dOut, { transposeA: true, precision })
    const dp = dOut.matmul(repeatHeads(v, heads), { transposeB: true, precision })
    const delta = dOut.mul(headsFirst(out)).sum(-1, true)
    const ds = p.mul(dp.sub(delta)).mul(scale)
    const dq = ds.matmul(repeatHeads(k, heads), { precision })
    const dk = ds.matmul(headsFirst(q), { transposeA: true, precision })
    return [headsFirst(dq), sumHeads(dk, k.shape[2]), sumHeads(dv, v.shape[2])]
  },
  vjp: null,
}

/**
 * Gathers the rows of each sequence in order, `[N, P, C]` to `[B, M * P, C]`. Rows that are not in use become zeros.
 */
function pagedRows(cache: Tensor, lengths: Tensor, pages: Tensor): Tensor {
  const { backend } = cache
  const [numbers, size, features] = cache.shape
  const [batch, count] = pages.shape
  const room = count * size
  const row = arange(room, { backend }).reshape([1, room])
  const index = pages
    .reshape([batch, count, 1])
    .mul(size)
    .add(arange(size, { backend }).reshape([1, 1, size]))
    .reshape([batch, room])
  const inUse = where(row.lt(lengths.reshape([batch, 1])), index, full([], -1, index))
  return cache.reshape([numbers * size, features]).takeRows(inUse)
}

export const latentAttentionDefinition: FusedDefinition<'latentAttention'> = {
  name: 'latentAttention',
  infer([q, cache, lengths, pages], { valueDim }) {
    needDtype('latentAttention', 'q', q, 'f32')
    needDtype('latentAttention', 'cache', cache, 'f32', 'bf16')
    needShape('latentAttention', 'q', q, [-1, -1, -1, -1], 'pass q [B, T, H, C]')
    needShape('latentAttention', 'cache', cache, [pages === undefined ? q.shape[0] : -1, -1, q.shape[3]])
    needDtype('latentAttention', 'lengths', lengths, 'i32')
    needShape('latentAttention', 'lengths', lengths, [q.shape[0]])
    if (pages !== undefined) {
      needDtype('latentAttention', 'pages', pages, 'i32')
      needShape('latentAttention', 'pages', pages, [q.shape[0], -1])
    }
    if (!Number.isInteger(valueDim) || valueDim < 1 || valueDim > q.shape[3]) {
      throw attrError(
        'latentAttention',
        `valueDim = ${valueDim} is not in 1..${q.shape[3]}`,
        'pass the size of the latent',
      )
    }
    return [{ shape: [...q.shape.slice(0, 3), valueDim], dtype: 'f32' }]
  },
  decompose([q, cache, lengths, pages], { scale, valueDim, precision }) {
    // Without pages, each sequence has one of its own.
    const own = () => arange(cache.shape[0], cache).reshape([cache.shape[0], 1])
    const rows = pagedRows(cache, lengths, pages ?? own())
    const keys = rows.cast('f32').reshape([rows.shape[0], rows.shape[1], 1, rows.shape[2]])
    const values = keys.narrow(3, 0, valueDim)
    return [runFused(attentionDefinition, [q, keys, values, lengths], { causal: true, scale, precision })[0]]
  },
  vjp: null,
}

/** Options of `attention`. */
export interface AttentionOptions {
  /**
   * If true, query i of T sees the keys up to its own position, where the last query has the position of the last key.
   * Default true.
   */
  readonly causal?: boolean | undefined
  /** Factor of the scores. Default: 1 / sqrt(features of a key). */
  readonly scale?: number | undefined
  /** `i32 [B]`: the number of keys in use of each sequence. Default: all. */
  readonly lengths?: Tensor | undefined
  /**
   * `i32 [B, T]`: the first key that each query sees. Default: 0. To pack several texts into a row without letting them
   * see each other, pass the position where the query's own text begins.
   */
  readonly starts?: Tensor | undefined
  /** Precision of both products. Default: that of `withPrecision`, with bf16 instead of fp8. */
  readonly precision?: WidePrecision | undefined
}

const attentionNames: OptionNames<AttentionOptions> = {
  causal: true,
  scale: true,
  lengths: true,
  starts: true,
  precision: true,
}

/**
 * Returns softmax(q k^T * scale) v, for `q [B, T, H, Dk]`, `k [B, S, G, Dk]` and `v [B, S, G, Dv]`, as `[B, T, H, Dv]`.
 * H must be a multiple of G. A query that sees no key gives zeros.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = {}): Tensor {
  checkOptions('attention', options, attentionNames)
  const { causal = true, scale = q.shape[3] ** -0.5, precision = widePrecision(), starts } = options
  const attrs = { causal, scale, precision }
  if (starts === undefined) {
    return runFused(
      attentionDefinition,
      options.lengths === undefined ? [q, k, v] : [q, k, v, options.lengths],
      attrs,
    )[0]
  }
  const lengths = options.lengths ?? full([k.shape[0]], k.shape[1], { dtype: 'i32', backend: q.backend })
  return runFused(attentionDefinition, [q, k, v, lengths, starts], attrs)[0]
}

/** Options of `latentAttention`. */
export interface LatentAttentionOptions {
  /** Factor of the scores: 1 / sqrt(nope + rope features of a head), times YaRN's correction. */
  readonly scale: number
  /** Features of a value: the first ones of each row of the cache. */
  readonly valueDim: number
  /** Precision of both products. Default: that of `withPrecision`, with bf16 instead of fp8. */
  readonly precision?: WidePrecision | undefined
  /**
   * `i32 [B, M]`: for a paged cache of N pages with P rows each, the pages of each sequence. Row s of sequence b is
   * `cache[pages[b, floor(s / P)], s % P]`, so a sequence has room for M * P rows. Sequences may share pages. All
   * entries must be page numbers in 0..N-1; pages that no row in use needs are not read.
   */
  readonly pages?: Tensor | undefined
}

const latentAttentionNames: OptionNames<LatentAttentionOptions> = {
  scale: true,
  valueDim: true,
  precision: true,
  pages: true,
}

/**
 * Absorbed MLA decoding: attention of `q [B, T, H, C]` over the latent cache `[B, S, C]` (f32 or bf16), of which
 * sequence b uses `lengths[b]` rows (`i32 [B]`). The values are the first `valueDim` features of the same rows. With
 * `pages`, the cache is `[N, P, C]`. Causal: the last query sees all rows in use. Returns `[B, T, H, valueDim]`. V3
 * report eq. 1-11, with W_UK and W_UV absorbed.
 * @throws MoeError E_SHAPE, E_DTYPE, E_ATTR
 */
export function latentAttention(q: Tensor, cache: Tensor, lengths: Tensor, options: LatentAttentionOptions): Tensor {
  checkOptions('latentAttention', options, latentAttentionNames)
  const { scale, valueDim, precision = widePrecision(), pages } = options
  return runFused(latentAttentionDefinition, pages === undefined ? [q, cache, lengths] : [q, cache, lengths, pages], {
    scale,
    valueDim,
    precision,
  })[0]
}
