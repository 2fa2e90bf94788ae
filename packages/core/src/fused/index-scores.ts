/** @file The scores by which sparse attention selects keys (DeepSeek-V3.2 report 2.1, eq. 1). */
import { needDtype, needShape } from '../checks.ts'
import { arange, full } from '../create.ts'
import type { IndexScoresAttrs, WidePrecision } from '../ops.ts'
import { checkOptions, type OptionNames } from '../options.ts'
import { widePrecision } from '../precision.ts'
import { concat, where } from '../primitives.ts'
import { composed, type Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

/** Maximum number of products of a query and a key that a decomposition computes at once: 64 MiB. Tests reduce it. */
export const productLimits = { elements: 2 ** 24 }

/** `x [B, n, S]`, with `hidden` in place of the keys at or past the limits `[B, n]`. */
function upTo(x: Tensor, limits: Tensor | undefined, hidden: number): Tensor {
  if (limits === undefined) return x
  const [batch, time, keys] = x.shape
  const isSeen = arange(keys, x)
    .reshape([1, 1, keys])
    .lt(limits.reshape([batch, time, 1]))
  return where(isSeen, x, full([], hidden, x))
}

/** q . k for all queries, heads and keys: `[B, n * J, S]`. */
function productsOf(q: Tensor, keys: Tensor, { precision }: IndexScoresAttrs): Tensor {
  const [batch, time, heads, features] = q.shape
  return q.reshape([batch, time * heads, features]).matmul(keys, { transposeB: true, precision })
}

/** ReLU. Its slope at 0 is 0; NaN stays NaN. */
const rectified = (x: Tensor) => where(x.le(0), full([], 0, x), x)

/** Returns the results of `compute` for pieces of the queries, whose products are within the limit. */
function inPieces<T extends Tensor | Tensor[]>(
  inputs: readonly Tensor[],
  compute: (from: number, to: number) => T,
): T[] {
  const [batch, time, heads] = inputs[0].shape
  const keys = inputs[2].shape[1]
  const step = Math.max(1, Math.floor(productLimits.elements / Math.max(1, batch * heads * keys)))
  return Array.from({ length: Math.ceil(time / step) }, (_, i) =>
    composed(inputs, () => compute(i * step, Math.min(time, (i + 1) * step))),
  )
}

export const indexScoresDefinition: FusedDefinition<'indexScores'> = {
  name: 'indexScores',
  infer([q, weights, keys, limits]) {
    for (const [name, value] of Object.entries({ q, weights, keys })) needDtype('indexScores', name, value, 'f32')
    needShape('indexScores', 'q', q, [-1, -1, -1, -1], 'pass q [B, T, J, D], weights [B, T, J] and keys [B, S, D]')
    const [batch, time, heads, features] = q.shape
    needShape('indexScores', 'weights', weights, [batch, time, heads])
    needShape('indexScores', 'keys', keys, [batch, -1, features])
    if (limits !== undefined) {
      needDtype('indexScores', 'limits', limits, 'i32')
      needShape('indexScores', 'limits', limits, [batch, time])
    }
    return [{ shape: [batch, time, keys.shape[1]], dtype: 'f32' }]
  },
  decompose(inputs, attrs) {
    const [q, weights, keys, limits] = inputs
    const [batch, time, heads] = q.shape
    const count = keys.shape[1]
    if (time === 0) return [full([batch, 0, count], 0, q)]
    const parts = inPieces(inputs, (from, to) => {
      const queries = to - from
      const perHead = rectified(productsOf(q.narrow(1, from, to), keys, attrs)).reshape([batch * queries, heads, count])
      const scores = weights
        .narrow(1, from, to)
        .reshape([batch * queries, 1, heads])
        .matmul(perHead, { precision: 'f32' })
        .reshape([batch, queries, count])
      return upTo(scores, limits?.narrow(1, from, to), Number.NEGATIVE_INFINITY)
    })
    return [concat(parts, 1)]
  },
  vjp: ({ inputs: [q, weights, keys, ...limits], attrs }, [dscores]) =>
    dscores === null
      ? [null, null, null, null]
      : [...runFused(indexScoresBackwardDefinition, [q, weights, keys, dscores, ...limits], attrs), null],
}

export const indexScoresBackwardDefinition: FusedDefinition<'indexScoresBackward'> = {
  name: 'indexScoresBackward',
  infer: ([q, weights, keys]) => [q, weights, keys],
  decompose(inputs, attrs) {
    const [q, weights, keys, dscores, limits] = inputs
    const [batch, time, heads, features] = q.shape
    const count = keys.shape[1]
    if (time === 0) return [q, weights, full(keys.shape, 0, keys)]
    const parts = inPieces(inputs, (from, to) => {
      const queries = to - from
      const products = productsOf(q.narrow(1, from, to), keys, attrs)
      const d = upTo(dscores.narrow(1, from, to), limits?.narrow(1, from, to), 0)
      const perHead = rectified(products).reshape([batch * queries, heads, count])
      const dWeights = perHead.matmul(d.reshape([batch * queries, count, 1]), { precision: 'f32' })
      const ofHeads = d
        .reshape([batch, queries, 1, count])
        .mul(weights.narrow(1, from, to).reshape([batch, queries, heads, 1]))
        .reshape(products.shape)
      const dProducts = where(products.le(0), full([], 0, ofHeads), ofHeads)
      const flat = q.narrow(1, from, to).reshape([batch, queries * heads, features])
      return [
        dProducts.matmul(keys, attrs).reshape([batch, queries, heads, features]),
        dWeights.reshape([batch, queries, heads]),
        dProducts.matmul(flat, { ...attrs, transposeA: true }),
      ]
    })
    const [dq, dWeights] = [0, 1].map(i =>
      concat(
        parts.map(part => part[i]),
        1,
      ),
    )
    return [dq, dWeights, parts.map(part => part[2]).reduce((sum, part) => sum.add(part))]
  },
  vjp: null,
}

/** Options of `indexScores`. */
export interface IndexScoresOptions {
  /**
   * `i32 [B, T]`: the number of keys that each query sees. The scores of the other keys are -Infinity, and kernels save
   * the time for them. Default: all keys.
   */
  readonly limits?: Tensor | undefined
  /** Precision of the products of queries and keys. Default: that of `withPrecision`, with bf16 instead of fp8. */
  readonly precision?: WidePrecision | undefined
}

const optionNames: OptionNames<IndexScoresOptions> = { limits: true, precision: true }

/**
 * Returns the index scores `[B, T, S]` of sparse attention: for each query and key, the sum over the heads j of
 * weights_j ReLU(q_j . k). The queries `q [B, T, J, D]` have J heads with `weights [B, T, J]`; the keys `[B, S, D]`
 * have one. The products of the single heads are not stored. DeepSeek-V3.2 report eq. 1.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function indexScores(q: Tensor, weights: Tensor, keys: Tensor, options: IndexScoresOptions = {}): Tensor {
  checkOptions('indexScores', options, optionNames)
  const { limits, precision = widePrecision() } = options
  return runFused(indexScoresDefinition, limits ? [q, weights, keys, limits] : [q, weights, keys], { precision })[0]
}
