/** @file What a launcher sees of the device: kernels as functions of numbers, and memory for outputs. */
import type {
  DType,
  FusedAttrs,
  FusedKernel,
  FusedName,
  Kernel,
  PrimitiveAttrs,
  PrimitiveName,
  TensorSpec,
  Value,
} from '@moe/core'
import { dtypeBytes, type OpAttrs, type OpName, sizeOf } from '@moe/core'
import type { CublasLt } from './cublas-lt/products.ts'
import type { Device } from './driver/device.ts'
import { type Recording, recordedAttrs } from './graph.ts'
import type { CudaBuffer, Memory } from './memory.ts'
import type { CudaKernel, Modules } from './modules.ts'
import type { Stream } from './stream.ts'
import type { BoxedMatrices, TensorMap } from './tensor-map.ts'

/** Ops with kernels for Hopper alone. */
export const hopperOps = [
  'matmul',
  'grouped-matmul',
  'routed-experts',
  'linear-cross-entropy',
  'attention',
  'latent-attention',
  'fp8-matmul',
] as const
export type HopperOp = (typeof hopperOps)[number]

export interface Cuda {
  /** Compute capability times ten. */
  readonly capability: number
  readonly multiprocessors: number
  /** Most dynamic shared memory of a block, in bytes. */
  readonly sharedMemory: number
  /** Whether Hopper's products of warpgroups and its copy engine are used at all. */
  readonly wgmma: boolean
  /** Whether they are for this op: its module `<op>-sm90a`. */
  onHopper(op: HopperOp): boolean
  /** NVIDIA's dense products, where they are asked for and installed. */
  readonly cublasLt: CublasLt | undefined
  /** Matrices as Hopper's copy engine takes them (signature `t`). */
  tensorMap(matrices: BoxedMatrices): TensorMap
  /** The kernel of a module (the op's folder), loaded at its first launch. Signature: see device/README.md. */
  kernel(module: string, name: string, signature: string): CudaKernel
  /** Uninitialized memory for an output. */
  output(spec: TensorSpec): CudaBuffer
  /** Uninitialized memory that is given back when the op returns. */
  scratch(bytes: number): CudaBuffer
  /** Where a copy of the value in that form lies until the value changes; whoever is first fills it. */
  rounded(value: Value, form: string, bytes: number): { pointer: number; isFilled: boolean }
  /** Where the f32 output of the op that runs is to be written in bf16, too, element by element, or 0: Memory.roundedBy. */
  roundedBy(output: CudaBuffer, kind: string): number
  /** The value's own buffer with one more owner when nobody else holds it, otherwise a copy. For ops that donate an input. */
  donated(value: Value): CudaBuffer
  /** A copy of the value's elements. */
  copied(value: Value): CudaBuffer
  /** The value's buffer with one more owner. */
  shared(value: Value): CudaBuffer
  /**
   * Attributes as floats in device memory, valid for this op. A kernel that reads them there, rather than as arguments, can be replayed in a
   * graph with others.
   */
  attributes<O extends OpName>(op: O, attrs: OpAttrs[O], encode: (attrs: OpAttrs[O]) => readonly number[]): number
  /** Device to device. */
  copy(to: number, from: number, bytes: number): void
  /** Zeros. */
  clear(pointer: number, bytes: number): void
}

/** Makes the kernel of an op for one backend. */
export type PrimitiveFactory<P extends PrimitiveName> = (cuda: Cuda) => Kernel<PrimitiveAttrs[P]>
export type FusedFactory<F extends FusedName> = (cuda: Cuda) => FusedKernel<FusedAttrs[F]>

/** Address of a value's first element. */
export const pointerOf = (value: Value): number => (value.handle as CudaBuffer).pointer

/** Blocks of 256 threads for `n` elements, four to a thread, no more than keep the device busy (kernels stride over the rest). */
export function elementwiseGrid(cuda: Cuda, n: number): number {
  return Math.min(Math.ceil(n / 1024), cuda.multiprocessors * 16)
}

/** The variants of a kernel for elements of 1, 2 and 4 bytes: `<name>_b8`, `_b16`, `_b32`. */
export function bySize(cuda: Cuda, module: string, name: string, signature: string): (dtype: DType) => CudaKernel {
  const kernels = [1, 2, 4].map(bytes => cuda.kernel(module, `${name}_b${bytes * 8}`, signature))
  return dtype => kernels[dtypeBytes[dtype] >> 1]
}

export function createCuda(
  device: Device,
  memory: Memory,
  modules: Modules,
  stream: Stream,
  recording: () => Recording | null,
  products: Pick<Cuda, 'wgmma' | 'onHopper' | 'tensorMap' | 'cublasLt'>,
): Cuda {
  const constants = new Constants(memory, stream)
  function copied(value: Value): CudaBuffer {
    const buffer = value.handle as CudaBuffer
    const fresh = memory.allocate(buffer.bytes)
    stream.copy(fresh.pointer, buffer.pointer, buffer.bytes)
    return fresh
  }
  return {
    ...products,
    capability: device.capability,
    multiprocessors: device.multiprocessors,
    sharedMemory: device.sharedMemory,
    kernel: (module, name, signature) => modules.kernel(module, name, signature, launch => stream.launch(launch)),
    output: spec => memory.allocate(sizeOf(spec.shape) * dtypeBytes[spec.dtype]),
    scratch: bytes => memory.scratch(bytes),
    rounded: (value, form, bytes) => memory.rounded(value.handle as CudaBuffer, form, bytes),
    roundedBy: (output, kind) => memory.roundedBy(output, kind),
    donated(value) {
      const buffer = value.handle as CudaBuffer
      if (buffer.refs > 1) return copied(value)
      memory.changed(buffer)
      return memory.share(buffer)
    },
    copied,
    shared: value => memory.share(value.handle as CudaBuffer),
    attributes(op, attrs, encode) {
      const graph = recording()
      return graph === null ? constants.upload(encode(attrs), op) : recordedAttrs(graph, memory, op, attrs, encode)
    },
    copy: (to, from, bytes) => stream.copy(to, from, bytes),
    clear: (pointer, bytes) => stream.clear(pointer, bytes),
  }
}

/** The latest attributes in device memory. An optimizer passes the same ones for every parameter: they go up once. */
class Constants {
  readonly #memory: Memory
  readonly #stream: Stream
  #key = ''
  #pointer = 0

  constructor(memory: Memory, stream: Stream) {
    this.#memory = memory
    this.#stream = stream
  }

  upload(values: readonly number[], op: string): number {
    const key = `${op} ${values}`
    if (key === this.#key) return this.#pointer
    if (this.#pointer === 0) this.#pointer = this.#memory.reserve(256)
    this.#stream.upload(this.#pointer, Float32Array.from(values), op)
    this.#key = key
    return this.#pointer
  }
}
