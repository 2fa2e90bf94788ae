/**
 * @file The contract between core and a backend: its memory, its lifecycle, and its tables of kernels. `ops.ts` defines
 * what each kernel computes.
 *
 * Core owns shapes, dtypes, autograd and all validation of user input. A backend gets checked inputs and the specs of
 * its outputs, and returns one new handle per output. All tensors are contiguous and row-major.
 *
 * Rules for every kernel:
 * - It may return before its work is done; only `download` and `sync` are awaited.
 * - It never changes an input, unless the op *donates* it (see `setRows`, `adamwStep` and `emaStep`).
 * - It returns the same bits when run twice on the same inputs.
 */
import type { DType, HostArray } from './dtype.ts'
import type { FusedAttrs, FusedName, OpAttrs, OpName, PrimitiveAttrs, PrimitiveName } from './ops.ts'
import type { Shape } from './shape.ts'

/** A backend's reference to a buffer. Opaque to core. */
export type Handle = unknown

/** A tensor as a backend sees it. */
export interface Value {
  /** The backend's buffer. */
  readonly handle: Handle
  /** Sizes of the axes; the elements are contiguous and row-major. */
  readonly shape: Shape
  /** Element type of the buffer. */
  readonly dtype: DType
}

/** Shape and dtype of an output, inferred by core. */
export interface TensorSpec {
  /** Sizes of the axes of the output to allocate. */
  readonly shape: Shape
  /** Element type of the buffer to allocate. */
  readonly dtype: DType
}

/** Computes an op and returns one handle per output, in order. */
export type Kernel<Attrs> = (inputs: readonly Value[], attrs: Attrs, outputs: readonly TensorSpec[]) => Handle[]
/** A kernel that may decline a size or dtype by returning undefined before doing any work. */
export type FusedKernel<Attrs> = (
  inputs: readonly Value[],
  attrs: Attrs,
  outputs: readonly TensorSpec[],
) => Handle[] | undefined

/** The kernels of all primitives. A table with a missing kernel does not compile. */
export type PrimitiveKernels = { readonly [P in PrimitiveName]: Kernel<PrimitiveAttrs[P]> }
/** The kernels of a backend's fused ops. Core decomposes missing ones and counts them in `fallbacks()`. */
export type FusedKernels = { readonly [F in FusedName]?: FusedKernel<FusedAttrs[F]> }

/** Memory use of a backend. */
export interface BackendStats {
  /** Live handles: uploaded or returned by a kernel, and not yet freed. */
  readonly handles: number
  /** Bytes held by those handles. */
  readonly bytes: number
  /** Highest `bytes` so far. */
  readonly peakBytes: number
}

/** Functions that return new attributes for the recorded calls of an op, given the previous ones. */
export type AttrUpdates = { readonly [O in OpName]?: (attrs: OpAttrs[O]) => OpAttrs[O] }

/** Options of `Backend.capture`. */
export interface CaptureOptions {
  /**
   * State that carries over from one replay to the next: tensors (parameters, buffers, moments, a cache) that `fn`
   * replaces by new values. At the end of the graph, each new value is copied into the old tensor's memory, which the
   * tensor keeps. Tensors that share this memory, also in the result, have the new value then.
   */
  readonly state?: ReadonlyArray<{ handle: Handle }> | undefined
}

/** A recorded sequence of ops. It keeps its own memory until `dispose`. */
export interface Graph<T> {
  /** What `fn` returned. Its tensors contain the values of the latest replay. */
  readonly result: T
  /** Number of kernels and copies in the graph. */
  readonly nodes: number
  /**
   * Runs the ops again on the current values of their inputs, which `Backend.write` changes.
   * @param updates new attributes, for ops that support it: `{ adamwStep: attrs => ({ ...attrs, lr, step }) }`
   */
  replay(updates?: AttrUpdates): void
  /** Frees the graph and its memory. Tensors of the result keep their current values. */
  dispose(): void
}

/**
 * A compute backend. Packages create one in `createBackend()`; `@moe/core/testing` verifies it. A backend does not
 * validate user input, because core already has.
 */
export interface Backend {
  /** Short name: `kernels-cpu`, `kernels-cuda`, `tfjs-wasm`, `reference`. */
  readonly name: string
  /** Human-readable name of the hardware, for example `AMD EPYC, AVX-512 BF16, 2 threads`. */
  readonly device: string
  /** Element types that it can store. Always contains f32, i32 and u8. */
  readonly dtypes: ReadonlySet<DType>
  /** Whether precision 'bf16' multiplies in bf16; if not, it runs in f32. */
  readonly bf16Matmul: boolean
  /**
   * Whether precision 'fp8' rounds operands to fp8; if not, it runs as 'bf16'. The product of the rounded operands may
   * use a wider type.
   */
  readonly fp8Matmul: boolean
  /** Creates a buffer with these elements, given as raw bits for the 16- and 8-bit floats. */
  upload(data: HostArray, shape: Shape, dtype: DType): Handle
  /** Returns the elements as a new host array, once they are computed. The handle may be freed in the meantime. */
  download(value: Value): Promise<HostArray>
  /** Frees a handle; called once per handle. Memory shared by reshapes lives until its last handle is freed. */
  free(handle: Handle): void
  /** Waits for all work so far, and reports errors of asynchronous work. */
  sync(): Promise<void>
  /** Returns current and peak memory use. */
  stats(): BackendStats
  /**
   * Overwrites the elements of a tensor in place: an input of a captured graph. All tensors that share its memory
   * change. Only present with `capture`.
   */
  write?(tensor: Value, data: HostArray): void
  /**
   * Records the ops that `fn` launches instead of running them. `replay` then launches them as one graph, without the
   * host's work for a step. Call `fn` once before, so that kernels are loaded and cached tables exist. `fn` must not
   * download; what it uploads becomes a constant of the graph. Backends that would not benefit omit this method.
   */
  capture?<T>(fn: () => T, options?: CaptureOptions): Graph<T>
  /** Returns memory that is cached for later tensors to the system. Backends without such a cache omit this method. */
  trim?(): void | Promise<void>
  /** Releases all resources. The backend is unusable afterwards. */
  dispose(): void
  /** Kernels of the primitives. */
  readonly primitives: PrimitiveKernels
  /** Kernels of the supported fused ops. */
  readonly fused: FusedKernels
}
