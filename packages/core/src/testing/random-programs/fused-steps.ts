/** @file Steps of random programs that run fused ops. */
import type { DType } from '../../dtype.ts'
import { attention, latentAttention } from '../../fused/attention.ts'
import { crossEntropy, linearCrossEntropy } from '../../fused/cross-entropy.ts'
import { combineTokens, dispatchPlan, permuteTokens } from '../../fused/dispatch.ts'
import { groupedMatmul } from '../../fused/grouped-matmul.ts'
import { indexScores } from '../../fused/index-scores.ts'
import { mlaKeyValue } from '../../fused/mla-key-value.ts'
import { quantizedGroupedMatmul, quantizedMatmul, quantizeWeight } from '../../fused/quantized-matmul.ts'
import { rmsNorm } from '../../fused/rms-norm.ts'
import { rope } from '../../fused/rope.ts'
import { routedExperts } from '../../fused/routed-experts.ts'
import { routerTopk } from '../../fused/router-topk.ts'
import { softmax } from '../../fused/softmax.ts'
import { swiglu } from '../../fused/swiglu.ts'
import type { WeightFormat } from '../../ops.ts'
import type { Shape } from '../../shape.ts'
import { noGrad } from '../../tape.ts'
import { below, count, flip, like, one, rows, type StepContext, type StepFunction } from './choices.ts'

/** Routes tokens, possibly to few of the experts. */
function routing(c: StepContext, tokens: number) {
  const groups = one(c, [1, 1, 2, 4])
  const each = one(c, [1, 2, 4])
  const experts = groups * each
  const topGroups = 1 + below(c, groups)
  const topK = 1 + below(c, topGroups * each)
  const logits = like(c, [tokens, experts])
  const bias = noGrad(() => c.integers([experts], -3, 4).cast('f32'))
  const routed = routerTopk(logits, bias, {
    scoring: flip(c) ? 'sigmoid' : 'softmax',
    groups,
    topGroups,
    groupScore: flip(c) ? 'top2' : 'max',
    topK,
    normalize: flip(c),
    scale: one(c, [1, 2.5]),
  })
  return { ...routed, experts, plan: dispatchPlan(routed.indices, experts) }
}

/** How each format stores its elements. */
const stored: Readonly<Record<WeightFormat, DType>> = { bf16: 'bf16', fp8: 'f8e4m3', int8: 'u8', int4: 'u8' }
const formats = Object.keys(stored) as WeightFormat[]

/** A quantized parameter, in any format. */
function quantized(c: StepContext, shape: Shape) {
  return noGrad(() => {
    const format = one(
      c,
      formats.filter(name => c.dtypes.has(stored[name])),
    )
    const block = format === 'bf16' || flip(c) ? undefined : ([1 + below(c, 3), 2 * (1 + below(c, 20))] as const)
    return quantizeWeight(c.parameter(shape).detach(), format, block)
  })
}

export const fusedSteps = {
  softmax: c => {
    const x = c.pick()
    return softmax(x.rank === 0 ? x.reshape([1]) : x)
  },
  rmsNorm(c) {
    const x = rows(c)
    return rmsNorm(x, like(c, [x.shape[1]]), one(c, [1e-6, 0.1]))
  },
  swiglu(c) {
    const x = c.pick()
    return swiglu(x, like(c, x.shape))
  },
  rope(c) {
    const [batch, time, heads, half, more] = [
      1 + below(c, 2),
      below(c, 5),
      1 + below(c, 3),
      1 + below(c, 4),
      below(c, 5),
    ]
    const x = like(c, [batch, time, heads, 2 * half + more])
    const angles = c.integers(flip(c) ? [time, half] : [batch, time, half], 0, 7).cast('f32')
    const plain = flip(c) ? like(c, [batch, time, heads, below(c, 5)]) : undefined
    return rope(x, angles.cos(), angles.sin(), { interleaved: flip(c), plain })
  },
  mlaKeyValue(c) {
    const [batch, keys, heads, nope, value, turned] = [
      1 + below(c, 2),
      below(c, 6),
      1 + below(c, 3),
      1 + below(c, 4),
      below(c, 5),
      below(c, 4),
    ]
    const { k, v } = mlaKeyValue(like(c, [batch, keys, heads, nope + value]), like(c, [batch, keys, 1, turned]), nope)
    return [k, v]
  },
  attention(c) {
    const [batch, groups, per] = [1 + below(c, 3), 1 + below(c, 2), 1 + below(c, 2)]
    const time = one(c, [0, 1, 2, 3, 5, 8, 17, 33])
    const keys = one(c, [time, time, 1, 7, 40])
    const [dk, dv] = [one(c, [1, 4, 8, 24, 33]), one(c, [1, 4, 16, 17])]
    const q = like(c, [batch, time, groups * per, dk])
    const k = like(c, [batch, keys, groups, dk])
    const v = flip(c) && dk === dv ? k : like(c, [batch, keys, groups, dv])
    return attention(q, k, v, {
      causal: flip(c),
      lengths: flip(c) ? c.integers([batch], 0, keys + 1) : undefined,
      starts: flip(c) ? c.integers([batch, time], 0, keys + 1) : undefined,
      ...(flip(c) ? { scale: 0.3 } : {}),
    })
  },
  indexScores(c) {
    const [batch, time, heads] = [1 + below(c, 3), below(c, 9), 1 + below(c, 4)]
    const [keys, features] = [one(c, [0, 1, 5, 17, 40]), one(c, [1, 4, 16, 33])]
    const q = like(c, [batch, time, heads, features])
    const limits = flip(c) ? c.integers([batch, time], 0, keys + 2) : undefined
    const weights = like(c, [batch, time, heads])
    // Hidden keys have -Infinity.
    return indexScores(q, weights, like(c, [batch, keys, features]), { limits }).maximum(-9)
  },
  latentAttention: c =>
    noGrad(() => {
      const [batch, time, heads, features] = [1 + below(c, 3), 1 + below(c, 3), 1 + below(c, 3), one(c, [4, 8, 20, 33])]
      const q = like(c, [batch, time, heads, features])
      const [pages, perPage, each] = [1 + below(c, 5), one(c, [1, 2, 8, 16]), 1 + below(c, 3)]
      const paged = flip(c)
      const cache = like(c, paged ? [pages, perPage, features] : [batch, perPage * each, features])
      const lengths = c.integers([batch], 0, perPage * each + 1)
      return latentAttention(q, flip(c) && c.dtypes.has('bf16') ? cache.cast('bf16') : cache, lengths, {
        scale: 0.4,
        valueDim: 1 + below(c, features),
        pages: paged ? c.integers([batch, each], 0, pages) : undefined,
      })
    }),
  crossEntropy(c) {
    const x = rows(c)
    const [n, classes] = x.shape
    return crossEntropy(x, c.integers([n], -1, classes + 2), { ignoreIndex: one(c, [-100, 0]) })
  },
  linearCrossEntropy(c) {
    const x = rows(c)
    const [n, features] = x.shape
    const classes = count(c)
    const targets = c.integers([n], -1, classes + 2)
    return linearCrossEntropy(x, like(c, [classes, features]), targets, { ignoreIndex: one(c, [-100, 0]) })
  },
  router(c) {
    const { weights, scores } = routing(c, one(c, [0, 1, 3, 8, 20]))
    return [weights, scores]
  },
  grouped(c) {
    const x = rows(c)
    const [tokens, features] = x.shape
    const { weights, plan, experts } = routing(c, tokens)
    const inner = count(c)
    const transposeW = flip(c)
    const weight = like(c, transposeW ? [experts, inner, features] : [experts, features, inner])
    const y = groupedMatmul(permuteTokens(x, plan), weight, plan.offsets, { transposeW }).mul(features ** -0.5)
    return combineTokens(y, weights, plan)
  },
  routedExperts(c) {
    const x = rows(c)
    const [tokens, features] = x.shape
    const { weights, plan, experts } = routing(c, tokens)
    const inner = count(c)
    const scale = features ** -0.5
    const gate = like(c, [experts, inner, features]).mul(scale)
    const up = like(c, [experts, inner, features]).mul(scale)
    const down = like(c, [experts, features, inner]).mul((inner || 1) ** -0.5)
    return routedExperts(x, { gate, up, down }, weights, plan, { recompute: flip(c) })
  },
  quantized(c) {
    const x = rows(c)
    const features = x.shape[1]
    return quantizedMatmul(x, quantized(c, [count(c) || 1, features])).mul(features ** -0.5)
  },
  quantizedGrouped(c) {
    const x = rows(c)
    const [tokens, features] = x.shape
    const { weights, plan, experts } = routing(c, tokens)
    const weight = quantized(c, [experts, count(c) || 1, features])
    const y = quantizedGroupedMatmul(permuteTokens(x, plan), weight, plan.offsets).mul(features ** -0.5)
    return combineTokens(y, weights, plan)
  },
} as const satisfies Readonly<Record<string, StepFunction>>
