/**
 * @file The ops and what they compute: attributes, shapes, dtypes and edge cases of the primitives, which every backend
 * implements, and of the fused ops, which it may implement.
 *
 * Sizes of zero are valid everywhere. Row indices out of range (in `takeRows`, `scatterAddRows`, `setRows` and
 * cross-entropy targets) are never read or written: a gathered row is zeros, a scattered row is dropped, and a target
 * contributes no loss.
 */
import type { DType } from './dtype.ts'

/**
 * Arithmetic of matrix products. Operands stay f32, or are rounded to bf16 or to f8e4m3; accumulation is always f32 or
 * better.
 *
 * In 'fp8', operands are rounded in tiles of `fp8Tile` along the summed axis. The scale of a tile is 2^e with the
 * smallest e >= -100 such that max|x| <= 448 * 2^e. Each x becomes the nearest multiple of the scale that f8e4m3 can
 * represent (ties to even); a tile with a NaN or an infinity becomes NaN. (DeepSeek-V3 report 3.3; scales as in V3.1.)
 */
export type Precision = 'f32' | 'bf16' | 'fp8'

/** Precision of products that never run in fp8: attention, the output head and batched products. */
export type WidePrecision = Exclude<Precision, 'fp8'>

/** Elementwise ops with one input; see `PrimitiveAttrs.unary`. */
export type UnaryCode =
  | 'neg'
  | 'abs'
  | 'sign'
  | 'exp'
  | 'log'
  | 'sqrt'
  | 'rsqrt'
  | 'sin'
  | 'cos'
  | 'tanh'
  | 'sigmoid'
  | 'floor'
/** Elementwise ops with two inputs; see `PrimitiveAttrs.binary`. */
export type BinaryCode = 'add' | 'sub' | 'mul' | 'div' | 'max' | 'min' | 'pow'
/** Comparisons, which return 1 where they hold. The others follow by swapping sides or negating. */
export type CompareCode = 'eq' | 'lt' | 'le'
/** Reductions. A mean is a sum and a product. */
export type ReduceCode = 'sum' | 'max'

/**
 * Attributes of each primitive.
 *
 * Dtypes: every op supports `f32`. `i32` is supported for neg, abs and sign, all binary codes except pow (div truncates
 * toward zero), compare, where, fill, reduce and cumsum, and as data of takeRows, scatterAddRows, setRows and the
 * movement ops. `u8` is supported for compare results, where conditions, fill and movement. `bf16`, `f16` and `f8e4m3`
 * are supported only for cast, fill, upload, download and the movement ops (reshape, permute, expand, slice, pad,
 * concat, takeRows, setRows), and only if listed in `Backend.dtypes`.
 */
export interface PrimitiveAttrs {
  /** `[x] -> [y]`, elementwise. sign(0) = 0. */
  unary: { readonly code: UnaryCode }
  /**
   * `[a, b] -> [y]`, with NumPy broadcasting to `outputs[0].shape`. max and min propagate NaN. i32 division by zero
   * gives 0.
   */
  binary: { readonly code: BinaryCode }
  /** `[a, b] -> [u8]`, with NumPy broadcasting. Any comparison with NaN is 0. */
  compare: { readonly code: CompareCode }
  /** `[cond u8, a, b] -> [y]`, with NumPy broadcasting of all three. */
  where: Record<never, never>
  /**
   * `[x] -> [y]`, converted to `outputs[0].dtype`. To integers: truncate toward zero and saturate (u8 to 0..255), NaN
   * becomes 0. To bf16, f16 and f8e4m3: round to nearest even (f8e4m3 saturates).
   */
  cast: { readonly dtype: DType }
  /** `[] -> [y]`, every element `value`. */
  fill: { readonly value: number }
  /**
   * `[x] -> [y]` over `axes` (ascending, at least one), keeping reduced axes with size 1. The sum of no elements is 0,
   * their max -Infinity (i32: -2^31). max propagates NaN.
   */
  reduce: { readonly code: ReduceCode; readonly axes: readonly number[] }
  /** `[x] -> [y]`, inclusive running sum along `axis`. */
  cumsum: { readonly axis: number }
  /**
   * `[x f32 [..., n]] -> [values f32 [..., k], indices i32 [..., k]]`, largest first, ties to the lowest index; NaN
   * counts as -Infinity. 1 <= k <= n.
   */
  topk: { readonly k: number }
  /**
   * `[a, b] -> [c]`, f32, both of rank 2, or both of rank 3 with the same leading size. a is `[m, k]` (`[k, m]` with
   * transposeA), b is `[k, n]` (`[n, k]` with transposeB). Precision 'fp8' occurs only with rank 2.
   */
  matmul: { readonly transposeA: boolean; readonly transposeB: boolean; readonly precision: Precision }
  /** `[x [n, ...rest], index i32 [...any]] -> [y [...any, ...rest]]`. */
  takeRows: Record<never, never>
  /**
   * `[index i32 [...any], source [...any, ...rest]] -> [y [rows, ...rest]]`: zeros plus every source row added to its
   * row, in source order. Sums of f32 are in f32, so the relative error of a row grows with the number of its source
   * rows, by 2^-24 each at most: 4 % for 4 million equal rows.
   */
  scatterAddRows: { readonly rows: number }
  /**
   * `[x [n, ...rest], index i32 [m], source [m, ...rest]] -> [y]`: x with rows replaced; the last of equal indices
   * wins. With `donate`, x is given up, so y may reuse its memory.
   */
  setRows: { readonly donate: boolean }
  /** `[x] -> [y]`, the same elements in the same order. Should share memory. */
  reshape: Record<never, never>
  /** `[x] -> [y]`, `y.shape[i] = x.shape[axes[i]]`. */
  permute: { readonly axes: readonly number[] }
  /** `[x] -> [y]`, broadcast to `outputs[0].shape` of the same rank by repeating axes of size 1. */
  expand: Record<never, never>
  /** `[x] -> [y]`, the box that begins at `starts` with the sizes of `outputs[0].shape`. */
  slice: { readonly starts: readonly number[] }
  /**
   * `[x] -> [y]`, with `before[i]` elements of `value` in front of axis i, and as many behind it as
   * `outputs[0].shape[i]` leaves. f32 and i32.
   */
  pad: { readonly before: readonly number[]; readonly value: number }
  /** `[...parts] -> [y]`, joined along `axis`; at least one part. */
  concat: { readonly axis: number }
}

/**
 * How affinities become a choice of experts: as in DeepSeek-V3 (sigmoid, bias, group score = sum of top 2) or V2
 * (softmax, group score = max).
 */
export interface RouterAttrs {
  /** Affinities of the experts: sigmoid of each logit (V3), or softmax over all logits (V2). */
  readonly scoring: 'sigmoid' | 'softmax'
  /** Number of contiguous groups of equal size that the experts form; 1 means no group limit. */
  readonly groups: number
  /** Groups kept per token, `1 <= topGroups <= groups`. */
  readonly topGroups: number
  /** Score of a group: the sum of its two highest biased scores (V3), or its highest one (V2). */
  readonly groupScore: 'top2' | 'max'
  /** Experts per token, at most `topGroups * E / groups`. */
  readonly topK: number
  /** Whether to divide the weights of the chosen experts by their sum + 1e-20. */
  readonly normalize: boolean
  /** Routed scaling factor, applied last. */
  readonly scale: number
}

/** Attributes of `attention` and `attentionBackward`. */
export interface AttentionAttrs {
  /**
   * If true, query i of T sees keys 0 to limit - T + i, inclusive, where limit is lengths[b] if given and S otherwise.
   * If false, every query sees all keys below the limit. A query that sees no key gives zeros (and lse -Infinity).
   */
  readonly causal: boolean
  /** Factor of the scores before the softmax. */
  readonly scale: number
  /** Precision of both products. The softmax runs in f32 or better. */
  readonly precision: WidePrecision
}

/** Attributes of `indexScores` and `indexScoresBackward`. */
export interface IndexScoresAttrs {
  /** Precision of the products of queries and keys, and of their gradients. The sum over heads runs in f32 or better. */
  readonly precision: WidePrecision
}

/** Attributes of `routedExperts`. */
export interface RoutedExpertsAttrs {
  /** Precision of the three products of an expert. */
  readonly precision: Precision
  /** Whether `routedExpertsBackward` will run. If so, the values it needs are additional outputs. */
  readonly saves: boolean
}

/** Attributes of one step of an exponential moving average; for the formula, see `FusedAttrs.emaStep`. */
export interface EmaAttrs {
  /** Weight of the previous average, in [0, 1). */
  readonly decay: number
  /** Number of this step, counted from 1. */
  readonly step: number
}

/** Attributes of one AdamW step; for the formula, see `FusedAttrs.adamwStep`. */
export interface AdamwAttrs {
  /** Learning rate of this step. */
  readonly lr: number
  /** Decay of the mean of gradients, in [0, 1). */
  readonly beta1: number
  /** Decay of the mean of squared gradients, in [0, 1). */
  readonly beta2: number
  /** Added to the square root of the second moment. */
  readonly eps: number
  /** Decoupled weight decay: a step subtracts `lr * weightDecay` times the parameter. */
  readonly weightDecay: number
  /** Number of this step, counted from 1. */
  readonly step: number
}

/**
 * Storage format of a quantized weight. `bf16` stores the rounded values themselves. The other formats store codes q,
 * and an f32 scale for each block of `QuantizedAttrs.block` = [br, bc] elements, `[ceil(N/br), ceil(K/bc)]`; blocks are
 * cropped at the edges.
 * - `fp8`: q is f8e4m3, value = q * scale.
 * - `int8`: q is u8, value = (q - 128) * scale.
 * - `int4`: q is u8 `[N, ceil(K/2)]`, with column 2j in the low and column 2j + 1 in the high half of byte j; value =
 *   (half - 8) * scale. bc is even. If K is odd, the last high half is unused.
 */
export type WeightFormat = 'bf16' | 'fp8' | 'int8' | 'int4'

/** How a quantized weight is stored, and multiplied. */
export interface QuantizedAttrs {
  /** Format of `q`. */
  readonly format: WeightFormat
  /** Rows and columns of the weight that share a scale. Ignored for bf16. */
  readonly block: readonly [rows: number, columns: number]
  /** K. The codes of an int4 weight do not show whether it is odd. */
  readonly columns: number
  /**
   * If true, x is multiplied by the transpose of the weight `[N, K]`, as in the forward pass of a layer; if false, by
   * the weight itself, as in the backward pass.
   */
  readonly transposeW: boolean
  /** As in `matmul`: whether x and the weight's values may be rounded to bf16 before the product. */
  readonly precision: WidePrecision
}

/**
 * Attributes of each fused op. A backend may omit any of these ops, and a kernel may return `undefined` to decline a
 * size or dtype. Core then runs the decomposition in `fused/` and counts it in `fallbacks()`.
 *
 * Legend: N rows, D features, B batch, T queries, S keys, H heads, G key/value heads (H is a multiple of G), J heads of an
 * indexer, E experts, K experts per token, I intermediate features of an expert, V vocabulary. All floats are f32,
 * except in `quantize`, the cache of `latentAttention`, quantized weights, the moments of `adamwStep`, and what
 * `routedExperts` saves.
 */
export interface FusedAttrs {
  /** `[x [..., D]] -> [y]` over the last axis. A row that is -Infinity everywhere gives zeros. */
  softmax: Record<never, never>
  /** `[y, dy] -> [dx]`: y * (dy - sum(y * dy)). */
  softmaxBackward: Record<never, never>
  /**
   * `[x [..., D], weight [D]] -> [y [..., D], rstd [...]]`: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps).
   */
  rmsNorm: { readonly eps: number }
  /** `[x, weight, rstd, dy] -> [dx, dweight]`. */
  rmsNormBackward: Record<never, never>
  /** `[gate, up] -> [y]`, same shapes: gate * sigmoid(gate) * up. */
  swiglu: Record<never, never>
  /** `[gate, up, dy] -> [dgate, dup]`. */
  swigluBackward: Record<never, never>
  /**
   * `[x [B, T, H, D], cos [T, R/2] | [B, T, R/2], sin (like cos), plain? [B, T, H, F]] -> [y [B, T, H, F + R]]`:
   * rotates the last R features of x. In front of them come the features of `plain`, or copies of the first F = D - R
   * features of x. Pair i is (x[2i], x[2i+1]) if interleaved, else (x[i], x[i + R/2]); (a, b) becomes (a cos - b sin, b
   * cos + a sin). `inverse` negates sin, which gives the gradient.
   */
  rope: { readonly interleaved: boolean; readonly inverse: boolean }
  /**
   * `[kv [B, S, H, N + V], ropeKey [B, S, 1, R]] -> [k [B, S, H, N + R], v [B, S, H, V]]`, N = `nope`. The keys are the
   * first N features and the rope key, which all heads share; the values are the last V features.
   */
  mlaKeyValue: { readonly nope: number }
  /** `[dk, dv] -> [dkv, dropeKey]`; dropeKey is summed over the heads. */
  mlaKeyValueBackward: { readonly nope: number }
  /**
   * `[q [B, T, H, Dk], k [B, S, G, Dk], v [B, S, G, Dv], lengths? i32 [B], starts? i32 [B, T]] -> [out [B, T, H, Dv],
   * lse [B, H, T]]`, where lse is the log of the sum of exponentials of the scaled scores. Query t of sequence b sees
   * no key before starts[b, t]. If that leaves no key, the result is the same as for an empty sequence. `starts` is
   * passed only together with lengths.
   */
  attention: AttentionAttrs
  /** `[q, k, v, out, lse, dout, lengths?, starts?] -> [dq, dk, dv]`. */
  attentionBackward: AttentionAttrs
  /**
   * Absorbed MLA decoding: attention whose keys are the rows of the latent cache and whose values are their first
   * `valueDim` features. `[q [B, T, H, C], cache [N, P, C], lengths i32 [B], pages? i32 [B, M]] -> [out [B, T, H,
   * valueDim]]`, causal with respect to `lengths` as in `attention`.
   *
   * Without pages, N = B and row s of sequence b is cache[b, s]. With pages, it is cache[pages[b, floor(s / P)], s %
   * P]; sequences may share pages. Rows at or after lengths[b] are never read, nor are pages that only such rows use;
   * entries of `pages` are in 0..N-1 for those too.
   *
   * The cache is f32, or bf16 if `Backend.dtypes` contains it. A kernel without bf16 support declines, and core casts
   * the cache to f32.
   */
  latentAttention: { readonly scale: number; readonly valueDim: number; readonly precision: WidePrecision }
  /**
   * `[q [B, T, J, D], weights [B, T, J], keys [B, S, D], limits? i32 [B, T]] -> [scores [B, T, S]]`: scores[b, t, s] is
   * the sum over the heads j of weights[b, t, j] * max(0, q[b, t, j] . keys[b, s]). Scores of keys at or past limits[b,
   * t] are -Infinity. NaN products stay NaN.
   */
  indexScores: IndexScoresAttrs
  /**
   * `[q, weights, keys, dscores, limits?] -> [dq, dweights, dkeys]`. The slope of max(0, x) at 0 is 0. dscores of keys
   * at or past a limit is ignored.
   */
  indexScoresBackward: IndexScoresAttrs
  /**
   * `[logits [N, V], targets i32 [N]] -> [loss [N], lse [N]]`; loss is 0 where the target is `ignoreIndex` or out of
   * range.
   */
  crossEntropy: { readonly ignoreIndex: number }
  /** `[logits, targets, lse, dloss [N]] -> [dlogits]`. */
  crossEntropyBackward: { readonly ignoreIndex: number }
  /**
   * `[x [N, D], weight [V, D], targets i32 [N]] -> [loss [N], lse [N]]` of logits = x weight^T, without storing the
   * logits.
   */
  linearCrossEntropy: { readonly ignoreIndex: number; readonly precision: WidePrecision }
  /** `[x, weight, targets, lse, dloss [N]] -> [dx, dweight]`. */
  linearCrossEntropyBackward: { readonly ignoreIndex: number; readonly precision: WidePrecision }
  /**
   * `[logits [N, E], bias [E]] -> [weights [N, K], indices i32 [N, K], scores [N, E]]`. Experts are chosen by scores +
   * bias; the bias affects nothing else, and the weights come from the unbiased scores. Experts outside the kept groups
   * are never chosen, whatever the signs. Highest choice first; ties go to the lowest index, among groups as among
   * experts.
   */
  routerTopk: RouterAttrs
  /** `[scores, indices, dweights [N, K], dscores [N, E]] -> [dlogits [N, E]]`. */
  routerTopkBackward: RouterAttrs
  /**
   * `[indices i32 [N, K]] -> [order i32 [N*K], positions i32 [N*K], offsets i32 [E+1], counts i32 [E]]`. Slot s = n*K +
   * k is choice k of token n. `order[p]` is the slot at sorted position p (by expert, then by slot), `positions` is its
   * inverse, and `offsets[e]` is the first position of expert e, with `offsets[E]` = N*K. Indices are in 0..E-1.
   */
  dispatchPlan: { readonly experts: number }
  /** `[x [N, D], order, positions] -> [y [N*K, D]]`: y[p] = x[order[p] / K]. */
  permuteTokens: { readonly topK: number }
  /** `[dy [N*K, D], positions] -> [dx [N, D]]`: dx[n] = sum over k of dy[positions[n*K + k]]. */
  permuteTokensBackward: { readonly topK: number }
  /**
   * `[y [N*K, D], weights [N, K], order, positions] -> [out [N, D]]`: out[n] = sum over k of weights[n, k] *
   * y[positions[n*K + k]].
   */
  combineTokens: Record<never, never>
  /** `[y, weights, order, positions, dout [N, D]] -> [dy [N*K, D], dweights [N, K]]`. */
  combineTokensBackward: Record<never, never>
  /**
   * `[x [N, k], weight [E, n, k] (transposeW) | [E, k, n], offsets i32 [E+1]] -> [y [N, n]]`: rows offsets[e] to
   * offsets[e+1] - 1 of x times the weight of expert e. Rows past offsets[E] give zeros.
   */
  groupedMatmul: { readonly transposeW: boolean; readonly precision: Precision }
  /**
   * `[x [N, k], dy [N, n], offsets i32 [E+1]] -> [dweight [E, n, k]]`: dy_e^T x_e; zeros for an expert without rows.
   */
  groupedMatmulWeightGrad: { readonly precision: Precision }
  /**
   * The routed experts of a layer, from tokens to tokens: `[x [N, D], gate [E, I, D], up [E, I, D], down [E, D, I],
   * weights [N, K], order i32 [M], positions i32 [M], offsets i32 [E+1]] -> [out [N, D]]`, with M = N*K and the last
   * three from `dispatchPlan`. Equals permuteTokens, groupedMatmul by gate and up, swiglu, groupedMatmul by down, and
   * combineTokens.
   *
   * With `saves`, the results of gate and up `[M, I]` are two more outputs, in expert order, in bf16 unless the
   * precision is f32. With such a precision, a kernel may also store all other results of products in bf16, except out
   * and gradients. The decomposition returns only out.
   */
  routedExperts: RoutedExpertsAttrs
  /**
   * `[x, gate, up, down, weights, order, positions, offsets, gateRows [M, I], upRows [M, I], dout [N, D]] -> [dx,
   * dgate, dup, ddown, dweights]`, reduced to those for which `needs` is true. The experts' outputs are not needed: dweights is
   * the product of down^T dout and the input of down.
   */
  routedExpertsBackward: { readonly precision: Precision; readonly needs: readonly boolean[] }
  /**
   * `[x, q [N, K], scale (not for bf16)] -> [y]`: x `[M, K]` times the transposed weight, giving `[M, N]`, or x `[M,
   * N]` times the weight, giving `[M, K]`; for the storage, see `WeightFormat`.
   */
  quantizedMatmul: QuantizedAttrs
  /**
   * `[x, q [E, N, K], offsets i32 [E+1], scale [E, ...] (not for bf16)] -> [y]`: `groupedMatmul` with quantized
   * weights. A decoding step has one row for each of a few experts, so a kernel should not read the weights of experts
   * without rows.
   */
  quantizedGroupedMatmul: QuantizedAttrs
  /**
   * `[param, grad, m, v, gradScale []] -> [param, m, v]`, all of one shape, with g = grad * gradScale and decoupled
   * weight decay (Loshchilov & Hutter 2019, as torch.optim.AdamW): p -= lr * wd * p; m = b1 m + (1-b1) g; v = b2 v +
   * (1-b2) g^2; p -= lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps). param, m and v are donated.
   *
   * m and v are both f32, or both bf16 if `Backend.dtypes` contains it. In bf16 they are rounded (nearest even) when
   * stored, after p was updated with the unrounded values. A kernel without bf16 support declines.
   */
  adamwStep: AdamwAttrs
  /**
   * `[average, value] -> [average]`, f32, of one shape: average += (1 - decay) / (1 - decay^step) (value - average).
   * average is donated.
   */
  emaStep: EmaAttrs
  /**
   * `[...tensors] -> [norm []]`: the square root of the sum of all squares. With `parts`, the result is `[3]`: three
   * numbers, largest first, whose sum is the norm in f64. The last two may be 0 if the sum is computed in f32.
   */
  globalNorm: { readonly parts: boolean }
  /**
   * `[x [R, C]] -> [q f8e4m3 [R, C], scale f32 [ceil(R/br), ceil(C/bc)]]`: for each block of `block` = [br, bc], scale
   * = max|x| / 448 (1 if that is 0) and q = x / scale.
   */
  quantize: { readonly block: readonly [number, number] }
}

/** Names of the ops that every backend implements. */
export type PrimitiveName = keyof PrimitiveAttrs
/** Names of the ops that a backend may implement. */
export type FusedName = keyof FusedAttrs
/** Attributes of every op by its name. */
export type OpAttrs = PrimitiveAttrs & FusedAttrs
/** Names of all ops. */
export type OpName = PrimitiveName | FusedName
