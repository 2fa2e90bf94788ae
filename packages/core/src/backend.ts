/**
 * @file The contract between core and a backend: lifecycle, the primitives every backend has, and the fused ops it may have.
 *
 * Core owns shapes, dtypes, all validation of user input and autograd. A backend gets inputs that are already checked and
 * the specs of its outputs, and returns one fresh handle per output. All tensors are contiguous and row-major.
 *
 * Rules that hold for every kernel:
 * - It returns at once or after the work, as it likes; only `download` and `sync` are waited for.
 * - It never changes an input, except where an op *donates* one (see `setRows`, `adamwStep` and `emaStep`).
 * - It gives the same bits when run twice on the same inputs.
 * - Sizes of zero are legal everywhere.
 * - Row indices outside their range (`takeRows`, `scatterAddRows`, `setRows`, cross-entropy targets) are never read or written:
 *   a gathered row is zeros, a scattered row is dropped, a target contributes no loss.
 */
import type { DType, HostArray } from './dtype.ts'

/** Sizes of the axes, outermost first; `[]` is a scalar. */
export type Shape = readonly number[]

/** Whatever a backend uses to name a buffer. Core never looks inside. */
export type Handle = unknown

/** What a backend sees of a tensor. */
export interface Value {
  /** The buffer, in the backend's terms. */
  readonly handle: Handle
  /** Contiguous and row-major. */
  readonly shape: Shape
  /** Element type of the buffer. */
  readonly dtype: DType
}

/** Shape and dtype of an output, inferred by core. */
export interface TensorSpec {
  /** The backend allocates as many elements. */
  readonly shape: Shape
  /** Element type of the buffer to allocate. */
  readonly dtype: DType
}

/**
 * Arithmetic of matrix products: operands kept in f32, rounded to bf16, or rounded to f8e4m3 in tiles of `fp8Tile` along the axis that is summed over, each with a power
 * of two as its scale; accumulation is always f32 or better. The tile's scale 2^e has the least e >= -100 with max|x| <= 448 * 2^e; x becomes the nearest multiple that f8e4m3
 * has (ties to even), and a tile with a NaN or an infinity becomes NaN. (DeepSeek-V3 report 3.3; scales as in V3.1.)
 */
export type Precision = 'f32' | 'bf16' | 'fp8'

/** Of the products that are not done in fp8: attention, the head, batches of small ones. */
export type WidePrecision = Exclude<Precision, 'fp8'>

/** Elementwise ops of one input; see `PrimitiveAttrs.unary`. */
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
/** Elementwise ops of two inputs; see `PrimitiveAttrs.binary`. */
export type BinaryCode = 'add' | 'sub' | 'mul' | 'div' | 'max' | 'min' | 'pow'
/** Comparisons, 1 where they hold; the others are these with sides swapped or negated. */
export type CompareCode = 'eq' | 'lt' | 'le'
/** Reductions; a mean is a sum and a product. */
export type ReduceCode = 'sum' | 'max'

/**
 * Attributes of each primitive. dtypes: `f32` everywhere; `i32` for neg/abs/sign, all binary codes but pow (div truncates toward zero),
 * compare, where, fill, reduce, cumsum, and as data of takeRows/scatterAddRows/setRows and of movement; `u8` for compare results,
 * where conditions, and movement. `bf16`, `f16`, `f8e4m3` only for cast, upload, download, reshape and the other movement ops
 * (permute, expand, slice, concat, takeRows, setRows), and only when listed in `Backend.dtypes`.
 */
export interface PrimitiveAttrs {
  /** `[x] -> [y]`, elementwise. sign(0) = 0. */
  unary: { readonly code: UnaryCode }
  /** `[a, b] -> [y]`, numpy broadcasting to `outputs[0].shape`. max/min propagate NaN. i32 division by zero gives 0. */
  binary: { readonly code: BinaryCode }
  /** `[a, b] -> [u8]`, numpy broadcasting; any comparison with NaN is 0. */
  compare: { readonly code: CompareCode }
  /** `[cond u8, a, b] -> [y]`, numpy broadcasting of all three. */
  where: Record<never, never>
  /** `[x] -> [y]` with `outputs[0].dtype`. To integers: truncate toward zero, saturate (u8 to 0..255), NaN to 0. To bf16/f16/f8: nearest even (f8 saturates). */
  cast: { readonly dtype: DType }
  /** `[] -> [y]`, every element `value`. */
  fill: { readonly value: number }
  /** `[x] -> [y]` over `axes` (ascending, at least one), reduced axes kept with size 1. sum of nothing is 0, max of nothing is -Infinity (i32: -2^31). max propagates NaN. */
  reduce: { readonly code: ReduceCode; readonly axes: readonly number[] }
  /** `[x] -> [y]`, inclusive running sum along `axis`. */
  cumsum: { readonly axis: number }
  /** `[x f32 [..., n]] -> [values f32 [..., k], indices i32 [..., k]]`, largest first, ties to the lowest index, NaN counts as -Infinity; 1 <= k <= n. */
  topk: { readonly k: number }
  /**
   * `[a, b] -> [c]`, both rank 2, or both rank 3 with the same leading size. a is `[m, k]` (`[k, m]` when transposeA),
   * b is `[k, n]` (`[n, k]` when transposeB), f32. Only those of rank 2 come in fp8.
   */
  matmul: { readonly transposeA: boolean; readonly transposeB: boolean; readonly precision: Precision }
  /** `[x [n, ...rest], index i32 [...any]] -> [y [...any, ...rest]]`. */
  takeRows: Record<never, never>
  /** `[index i32 [...any], source [...any, ...rest]] -> [y [rows, ...rest]]`: zeros plus every source row added to its row, in source order. */
  scatterAddRows: { readonly rows: number }
  /** `[x [n, ...rest], index i32 [m], source [m, ...rest]] -> [y]`: x with rows replaced (the last of equal indices wins). `donate`: x is given up, so y may be x's own memory. */
  setRows: { readonly donate: boolean }
  /** `[x] -> [y]`, same elements in the same order. Should share memory. */
  reshape: Record<never, never>
  /** `[x] -> [y]`, `y.shape[i] = x.shape[axes[i]]`. */
  permute: { readonly axes: readonly number[] }
  /** `[x] -> [y]` to `outputs[0].shape`, same rank, axes of size 1 repeated. */
  expand: Record<never, never>
  /** `[x] -> [y]`, from `starts`, sizes as in `outputs[0].shape`. */
  slice: { readonly starts: readonly number[] }
  /** `[x] -> [y]`, `before[i]` elements of `value` in front of axis i and the rest of `outputs[0].shape[i]` behind. f32, i32. */
  pad: { readonly before: readonly number[]; readonly value: number }
  /** `[...parts] -> [y]` along `axis`, at least one part. */
  concat: { readonly axis: number }
}

/** How affinities become choices: DeepSeek-V3 (sigmoid, bias, group score = sum of top 2) and V2 (softmax, group score = max). */
export interface RouterAttrs {
  /** Affinities of the experts: sigmoid of each logit (V3), or softmax over all (V2). */
  readonly scoring: 'sigmoid' | 'softmax'
  /** Experts lie in `groups` contiguous groups of equal size; 1 = no group limit. */
  readonly groups: number
  /** Groups kept per token, `1 <= topGroups <= groups`. */
  readonly topGroups: number
  /** Group score: sum of its two best biased scores (V3) or its best one (V2). */
  readonly groupScore: 'top2' | 'max'
  /** Experts per token, at most `topGroups * E / groups`. */
  readonly topK: number
  /** Divide the chosen weights by their sum + 1e-20. */
  readonly normalize: boolean
  /** Routed scaling factor, applied last. */
  readonly scale: number
}

/** Of `attention` and `attentionBackward`. */
export interface AttentionAttrs {
  /** Query i of T sees keys 0 ..= (limit - T + i), where limit is S, or lengths[b] when given. Not causal: keys below the limit. A query that sees nothing gives zeros (and lse -Infinity). */
  readonly causal: boolean
  /** Factor of the scores before the softmax. */
  readonly scale: number
  /** Of both products; the softmax is f32 or better. */
  readonly precision: WidePrecision
}

/** Of `routedExperts`. */
export interface RoutedExpertsAttrs {
  /** Of the three products of an expert. */
  readonly precision: Precision
  /** Whether `routedExpertsBackward` will be asked: then what it needs is an output, too. */
  readonly saves: boolean
}

/** Of one step of an exponential moving average; the formula is at `FusedAttrs.emaStep`. */
export interface EmaAttrs {
  /** What a value weighs of the next one, in [0, 1). */
  readonly decay: number
  /** 1 for the first value. */
  readonly step: number
}

/** Of one AdamW step; the formula is at `FusedAttrs.adamwStep`. */
export interface AdamwAttrs {
  /** Learning rate of this step. */
  readonly lr: number
  /** Decay of the mean of gradients, in [0, 1). */
  readonly beta1: number
  /** Decay of the mean of squared gradients, in [0, 1). */
  readonly beta2: number
  /** Added to the root of the mean square. */
  readonly eps: number
  /** Decoupled decay: a step takes `lr * weightDecay` of the parameter away. */
  readonly weightDecay: number
  /** 1 for the first step. */
  readonly step: number
}

/**
 * How a weight is stored in fewer bits. `bf16`: as it is. Of the others, each block of `QuantizedAttrs.block` = [br, bc] elements has an f32 scale,
 * `[ceil(N/br), ceil(K/bc)]`, cropped at the edges. `fp8`: q is f8e4m3, value = q * scale. `int8`: q is u8, value = (q - 128) * scale. `int4`: q is u8
 * `[N, ceil(K/2)]`, column 2j in the low and 2j + 1 in the high half of byte j, value = (half - 8) * scale; bc is even, and what stands behind an odd K means nothing.
 */
export type WeightFormat = 'bf16' | 'fp8' | 'int8' | 'int4'

/** How a stored weight is read, and multiplied. */
export interface QuantizedAttrs {
  /** What the elements of `q` are. */
  readonly format: WeightFormat
  /** Rows and columns of the weight that share a scale. Means nothing for bf16. */
  readonly block: readonly [rows: number, columns: number]
  /** K. Of an int4 weight the codes do not tell whether it is odd. */
  readonly columns: number
  /** Whether x is multiplied with the transpose of `[N, K]`, as layers do forwards; without, gradients go back. */
  readonly transposeW: boolean
  /** As in `matmul`: whether x and the weight's values may be rounded to bf16 before they are multiplied. */
  readonly precision: WidePrecision
}

/**
 * Attributes of each fused op. A backend may leave any of them out, and a kernel may return `undefined` to decline a size or
 * dtype: core then runs the decomposition in `fused/` and counts it. Legend: N rows, D features, B batch, T queries, S keys,
 * H heads, G key/value heads (H is a multiple of G), E experts, K experts per token, I inner features of an expert, V vocabulary. All floats are f32, but for
 * `quantize`, the cache of `latentAttention`, stored weights and what `routedExperts` saves.
 */
export interface FusedAttrs {
  /** `[x [..., D]] -> [y]` over the last axis. A row of only -Infinity gives zeros. */
  softmax: Record<never, never>
  /** `[y, dy] -> [dx]`: y * (dy - sum(y * dy)). */
  softmaxBackward: Record<never, never>
  /** `[x [..., D], weight [D]] -> [y [..., D], rstd [...]]`: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps). */
  rmsNorm: { readonly eps: number }
  /** `[x, weight, rstd, dy] -> [dx, dweight]`. */
  rmsNormBackward: Record<never, never>
  /** `[gate, up] -> [y]`, same shapes: gate * sigmoid(gate) * up. */
  swiglu: Record<never, never>
  /** `[gate, up, dy] -> [dgate, dup]`. */
  swigluBackward: Record<never, never>
  /**
   * `[x [B, T, H, D], cos [T, R/2] | [B, T, R/2], sin (like cos), plain? [B, T, H, F]] -> [y [B, T, H, F + R]]`: rotates the last R features of x; in front of
   * them stand those of `plain`, or copies of x's first F = D - R.
   * Pair i is (x[2i], x[2i+1]) when interleaved, else (x[i], x[i + R/2]); (a, b) -> (a cos - b sin, b cos + a sin).
   * `inverse` negates sin, which is the gradient.
   */
  rope: { readonly interleaved: boolean; readonly inverse: boolean }
  /**
   * `[kv [B, S, H, N + V], ropeKey [B, S, 1, R]] -> [k [B, S, H, N + R], v [B, S, H, V]]`, N = `nope`: the first N features and the rope key, the same for
   * all heads, are keys; the last V are values.
   */
  mlaKeyValue: { readonly nope: number }
  /** `[dk, dv] -> [dkv, dropeKey]`; dropeKey is summed over the heads. */
  mlaKeyValueBackward: { readonly nope: number }
  /**
   * `[q [B, T, H, Dk], k [B, S, G, Dk], v [B, S, G, Dv], lengths? i32 [B], starts? i32 [B, T]] -> [out [B, T, H, Dv], lse [B, H, T]]`, lse = log sum exp of the scaled
   * scores. Query t of sequence b sees no key before starts[b, t]; that it may see none at all is as for an empty sequence. `starts` comes with lengths.
   */
  attention: AttentionAttrs
  /** `[q, k, v, out, lse, dout, lengths?, starts?] -> [dq, dk, dv]`. */
  attentionBackward: AttentionAttrs
  /**
   * Absorbed MLA decode: attention whose keys are the latent cache rows and whose values are their first `valueDim` features.
   * `[q [B, T, H, C], cache [N, P, C], lengths i32 [B], pages? i32 [B, M]] -> [out [B, T, H, valueDim]]`, causal against `lengths` as in `attention`. Row s of
   * sequence b is cache[b, s], with N = B, or cache[pages[b, floor(s / P)], s % P] when there are pages, which sequences may share. Rows at or after lengths[b] are
   * never read, nor are pages that only such rows need; their numbers are in 0..N-1, too.
   * The cache is f32, or bf16 where `Backend.dtypes` has it: a kernel without a bf16 form declines, and core casts the cache up.
   */
  latentAttention: { readonly scale: number; readonly valueDim: number; readonly precision: WidePrecision }
  /** `[logits [N, V], targets i32 [N]] -> [loss [N], lse [N]]`; loss 0 where the target is `ignoreIndex` or out of range. */
  crossEntropy: { readonly ignoreIndex: number }
  /** `[logits, targets, lse, dloss [N]] -> [dlogits]`. */
  crossEntropyBackward: { readonly ignoreIndex: number }
  /** `[x [N, D], weight [V, D], targets i32 [N]] -> [loss [N], lse [N]]` of logits = x weight^T, without storing the logits. */
  linearCrossEntropy: { readonly ignoreIndex: number; readonly precision: WidePrecision }
  /** `[x, weight, targets, lse, dloss [N]] -> [dx, dweight]`. */
  linearCrossEntropyBackward: { readonly ignoreIndex: number; readonly precision: WidePrecision }
  /**
   * `[logits [N, E], bias [E]] -> [weights [N, K], indices i32 [N, K], scores [N, E]]`. choice = scores + bias decides alone; experts
   * outside the kept groups can never be chosen, whatever the signs; weights come from the unbiased scores. Best choice first, ties to the lowest index (groups and experts alike).
   */
  routerTopk: RouterAttrs
  /** `[scores, indices, dweights [N, K], dscores [N, E]] -> [dlogits [N, E]]`. */
  routerTopkBackward: RouterAttrs
  /**
   * `[indices i32 [N, K]] -> [order i32 [N*K], positions i32 [N*K], offsets i32 [E+1], counts i32 [E]]`. Slot s = n*K + k. `order[p]` is the slot at
   * sorted position p (by expert, then by slot), `positions` its inverse, `offsets[e]` the first position of expert e, `offsets[E]` = N*K. Indices lie in 0..E-1.
   */
  dispatchPlan: { readonly experts: number }
  /** `[x [N, D], order, positions] -> [y [N*K, D]]`: y[p] = x[order[p] / K]. */
  permuteTokens: { readonly topK: number }
  /** `[dy [N*K, D], positions] -> [dx [N, D]]`: dx[n] = sum over k of dy[positions[n*K + k]]. */
  permuteTokensBackward: { readonly topK: number }
  /** `[y [N*K, D], weights [N, K], order, positions] -> [out [N, D]]`: out[n] = sum over k of weights[n, k] * y[positions[n*K + k]]. */
  combineTokens: Record<never, never>
  /** `[y, weights, order, positions, dout [N, D]] -> [dy [N*K, D], dweights [N, K]]`. */
  combineTokensBackward: Record<never, never>
  /** `[x [N, k], weight [E, n, k] (transposeW) | [E, k, n], offsets i32 [E+1]] -> [y [N, n]]`: rows offsets[e] .. offsets[e+1] of x times expert e's weight. Rows past offsets[E] give zeros. */
  groupedMatmul: { readonly transposeW: boolean; readonly precision: Precision }
  /** `[x [N, k], dy [N, n], offsets i32 [E+1]] -> [dweight [E, n, k]]`: dy_e^T x_e; zeros for an expert without rows. */
  groupedMatmulWeightGrad: { readonly precision: Precision }
  /**
   * Tokens to their experts, through them, and back: `[x [N, D], gate [E, I, D], up [E, I, D], down [E, D, I], weights [N, K], order i32 [M], positions i32 [M],
   * offsets i32 [E+1]] -> [out [N, D]]`, M = N*K and the last three as `dispatchPlan` gives them: permuteTokens, groupedMatmul by gate and up, swiglu, groupedMatmul
   * by down, combineTokens. With `saves`, gate's and up's results `[M, I]` follow, in expert order, in bf16 unless the precision is f32: a kernel may keep all that
   * products give, but for out and gradients, in bf16 then. The decomposition gives out alone.
   */
  routedExperts: RoutedExpertsAttrs
  /**
   * `[x, gate, up, down, weights, order, positions, offsets, gateRows [M, I], upRows [M, I], dout [N, D]] -> [dx, dgate, dup, ddown, dweights]`, of these the `wanted`
   * ones. The experts' outputs are not needed: dweights is the product of down^T dout with what down was multiplied with.
   */
  routedExpertsBackward: { readonly precision: Precision; readonly wanted: readonly boolean[] }
  /** `[x, q [N, K], scale (not for bf16)] -> [y]`: x `[M, K]` times the stored weight transposed to `[M, N]`, or `[M, N]` times the weight to `[M, K]`; see `WeightFormat`. */
  quantizedMatmul: QuantizedAttrs
  /**
   * `[x, q [E, N, K], offsets i32 [E+1], scale [E, ...] (not for bf16)] -> [y]`: as `groupedMatmul`, with stored weights. A decoding step has
   * one row for each of a few experts: weights of experts without rows should not be read.
   */
  quantizedGroupedMatmul: QuantizedAttrs
  /**
   * `[param, grad, m, v, gradScale []] -> [param, m, v]`, all of one shape, g = grad * gradScale; decoupled decay (Loshchilov & Hutter 2019, as torch.optim.AdamW):
   * p -= lr * wd * p; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; p -= lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps). param, m and v are donated.
   * m and v are f32, or both bf16 where `Backend.dtypes` has it: then they are rounded (nearest even) as they are stored, after p has been changed by them. A kernel without a bf16 form declines.
   */
  adamwStep: AdamwAttrs
  /** `[average, value] -> [average]`, f32 of one shape: average += (1 - decay) / (1 - decay^step) (value - average). average is donated. */
  emaStep: EmaAttrs
  /** `[...tensors] -> [norm []]`: square root of the sum of all squares. `parts`: `[3]`, whose sum is the norm in f64, the largest first; the others may be 0 where it is summed in f32. */
  globalNorm: { readonly parts: boolean }
  /** `[x [R, C]] -> [q f8e4m3 [R, C], scale f32 [ceil(R/br), ceil(C/bc)]]`: per block of `block` = [br, bc], scale = max|x| / 448 (1 for an all-zero block), q = x / scale. */
  quantize: { readonly block: readonly [number, number] }
}

/** Names of the ops that every backend has. */
export type PrimitiveName = keyof PrimitiveAttrs
/** Names of the ops that a backend may have. */
export type FusedName = keyof FusedAttrs
/** Attributes of every op by its name. */
export type OpAttrs = PrimitiveAttrs & FusedAttrs
/** Names of all ops. */
export type OpName = PrimitiveName | FusedName

/** One handle per output, in order. */
export type Kernel<Attrs> = (inputs: readonly Value[], attrs: Attrs, outputs: readonly TensorSpec[]) => Handle[]
/** Like Kernel, but may decline (wrong size or dtype for it) by returning undefined before doing any work. */
export type FusedKernel<Attrs> = (
  inputs: readonly Value[],
  attrs: Attrs,
  outputs: readonly TensorSpec[],
) => Handle[] | undefined

/** One kernel for each primitive: the table does not compile while one lacks. */
export type PrimitiveKernels = { readonly [P in PrimitiveName]: Kernel<PrimitiveAttrs[P]> }
/** Kernels of a backend's fused ops; one that lacks is decomposed by core and counted in `fallbacks()`. */
export type FusedKernels = { readonly [F in FusedName]?: FusedKernel<FusedAttrs[F]> }

/** Memory of a backend, as tests and trainings watch it. */
export interface BackendStats {
  /** Handles that are alive (uploaded or returned by a kernel, not yet freed). */
  readonly handles: number
  /** Bytes that those handles hold. */
  readonly bytes: number
  /** Highest `bytes` so far. */
  readonly peakBytes: number
}

/** New attributes for the recorded calls of an op, from those of the last time. */
export type AttrUpdates = { readonly [O in OpName]?: (attrs: OpAttrs[O]) => OpAttrs[O] }

/** What a captured graph carries from one run to the next. */
export interface CaptureOptions {
  /**
   * What one run leaves for the next: tensors (parameters, buffers, moments, a cache) that `fn` replaces by new values. At the end of the
   * graph each new value is copied to where the old one was, and the tensor stays there.
   */
  readonly state?: ReadonlyArray<{ handle: Handle }>
}

/** A recorded run of ops. Its memory is its own until `dispose`. */
export interface Graph<T> {
  /** What `fn` returned. Its tensors hold the values of the latest replay. */
  readonly result: T
  /** Kernels and copies in the graph. */
  readonly nodes: number
  /**
   * Runs it all again, on what its inputs hold now (`Backend.write` changes them).
   * @param updates New attributes for ops that can take some: `{ adamwStep: attrs => ({ ...attrs, lr, step }) }`.
   */
  replay(updates?: AttrUpdates): void
  /** Gives the graph and its memory back. Tensors of the result keep the values that they have. */
  dispose(): void
}

/**
 * What computes. Packages make one in `createBackend()`; `@moe/core/testing` proves one. A backend does not check what users pass, core has done
 * so.
 */
export interface Backend {
  /** Short name: `kernels-cpu`, `kernels-cuda`, `tfjs-wasm`, `reference`. */
  readonly name: string
  /** What it runs on, for people: `AMD EPYC, AVX-512 BF16, 2 threads`. */
  readonly device: string
  /** Element types that it can store; f32, i32 and u8 are always among them. */
  readonly dtypes: ReadonlySet<DType>
  /** Whether precision 'bf16' really multiplies in bf16 (otherwise it is done in f32). */
  readonly bf16Matmul: boolean
  /** Whether precision 'fp8' really rounds operands to fp8 (otherwise it is done as 'bf16'). What then multiplies them may be wider. */
  readonly fp8Matmul: boolean
  /** A new buffer with these elements; raw bits for the 16- and 8-bit floats. */
  upload(data: HostArray, shape: Shape, dtype: DType): Handle
  /** A fresh host array with the tensor's elements; waits for the work that makes them. The handle may be freed meanwhile. */
  download(value: Value): Promise<HostArray>
  /** Each handle is freed once. Memory shared by a reshape lives until its last handle is freed. */
  free(handle: Handle): void
  /** Waits for all work so far; reports errors of asynchronous work. */
  sync(): Promise<void>
  /** Memory in use now and at most so far. */
  stats(): BackendStats
  /** Replaces the elements of a tensor in place: an input of a captured graph. Everybody who shares its memory sees them. Only with `capture`. */
  write?(tensor: Value, data: HostArray): void
  /**
   * Records what `fn` launches instead of running it, as a graph that `replay` launches whole: a step without the host's part in it. Call `fn` once
   * before: kernels are then loaded and tables that it keeps are made. It may not download; what it uploads is a constant of the graph. Backends that
   * have nothing to gain leave it out.
   */
  capture?<T>(fn: () => T, options?: CaptureOptions): Graph<T>
  /** Gives memory that it keeps for later tensors back to the system. Backends that keep none leave it out. */
  trim?(): void | Promise<void>
  /** Gives everything back; the backend is unusable afterwards. */
  dispose(): void
  /** Kernels of the ops that every backend has. */
  readonly primitives: PrimitiveKernels
  /** Kernels of the fused ops that it has. */
  readonly fused: FusedKernels
}
