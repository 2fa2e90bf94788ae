/** @file The device as launchers see it: kernels as functions of numbers, and memory for outputs. */
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

/** Ops that have kernels for Hopper. */
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
  /** Maximum dynamic shared memory of a block, in bytes. */
  readonly sharedMemory: number
  /** Whether kernels with Hopper's instructions (wgmma, TMA) are enabled. */
  readonly wgmma: boolean
  /** Whether they are enabled for this op, whose kernels are in the module `<op>-sm90a`. */
  onHopper(op: HopperOp): boolean
  /** NVIDIA's dense products, if they are enabled and installed. */
  readonly cublasLt: CublasLt | undefined
  /** A tensor map for Hopper's copy engine (signature `t`). */
  tensorMap(matrices: BoxedMatrices): TensorMap
  /** A kernel of a module (the op's folder), loaded at its first launch. Signatures are described in device/README.md. */
  kernel(module: string, name: string, signature: string): CudaKernel
  /** Uninitialized memory for an output. */
  output(spec: TensorSpec): CudaBuffer
  /** Uninitialized memory that is freed when the op returns. */
  scratch(bytes: number): CudaBuffer
  /** A copy of the value in this form, cached until the value changes. The first caller has to fill it. */
  rounded(value: Value, form: string, bytes: number): { pointer: number; isFilled: boolean }
  /** Address to which the current op should also write its f32 output in bf16, element by element, or 0: see Memory.roundedBy. */
  roundedBy(output: CudaBuffer, kind: string): number
  /** For ops that donate an input: the value's own buffer with one more owner if nobody else owns it, otherwise a copy. */
  donated(value: Value): CudaBuffer
  /** A copy of the value's elements. */
  copied(value: Value): CudaBuffer
  /** The value's buffer with one more owner. */
  shared(value: Value): CudaBuffer
  /**
   * Address of attributes as floats in device memory, valid during this op. A kernel that reads attributes from there, rather than from its
   * arguments, can be replayed with other values.
   */
  attributes<O extends OpName>(op: O, attrs: OpAttrs[O], encode: (attrs: OpAttrs[O]) => readonly number[]): number
  /** Copies device memory to device memory. */
  copy(to: number, from: number, bytes: number): void
  /** Fills device memory with zeros. */
  clear(pointer: number, bytes: number): void
}

/** Creates the kernel of an op for one backend. */
export type PrimitiveFactory<P extends PrimitiveName> = (cuda: Cuda) => Kernel<PrimitiveAttrs[P]>
export type FusedFactory<F extends FusedName> = (cuda: Cuda) => FusedKernel<FusedAttrs[F]>

/** Address of a value's first element. */
export const pointerOf = (value: Value): number => (value.handle as CudaBuffer).pointer

/** Grid for elementwise kernels: blocks of 256 threads with four elements per thread, limited to what keeps the device busy (kernels loop). */
export function elementwiseGrid(cuda: Cuda, n: number): number {
  return Math.min(Math.ceil(n / 1024), cuda.multiprocessors * 16)
}

/** The kernel variants for elements of 1, 2 and 4 bytes: `<name>_b8`, `_b16`, `_b32`. */
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

/** The latest attributes in device memory. An optimizer passes the same ones for every parameter; they are uploaded once. */
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
