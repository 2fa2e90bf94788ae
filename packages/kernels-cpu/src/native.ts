/** @file The native side as launchers see it: kernels as functions of numbers, and memory for outputs. */
import type {
  DType,
  FusedAttrs,
  FusedKernel,
  FusedName,
  Kernel,
  OpAttrs,
  OpName,
  PrimitiveAttrs,
  PrimitiveName,
  TensorSpec,
  Value,
} from '@moe/core'
import { dtypeBytes, sizeOf } from '@moe/core'
import { bf16Isas, failure, type NativeLibrary } from './load.ts'
import type { CpuBuffer, Memory } from './memory.ts'
import type { RecordedAttrs, Recording } from './recording.ts'

/** A C++ kernel: takes addresses, sizes and attributes as numbers, in the order in which the kernel reads them. */
export type NativeKernel = (...values: number[]) => void

export interface Native {
  /**
   * Returns the kernel with this C name, which is looked up at its first call. Calls throw MoeError E_BACKEND or E_OUT_OF_MEMORY.
   *
   * With `common`, the kernel can do several calls at once. Its arguments are the `common` values that the calls share, the number of
   * calls, and then the values of each. Launchers make such calls one by one; consecutive ones in a recording are merged.
   */
  kernel(name: string, common?: number): NativeKernel
  /** Uninitialized memory for an output. */
  output(spec: TensorSpec): CpuBuffer
  /**
   * For ops that donate an input: the value's own buffer with one more owner if nobody else owns it, otherwise a copy. A buffer with a bf16
   * copy is only donated if the caller keeps that copy up to date (`writesRounded`).
   */
  donated(value: Value, writesRounded?: boolean): CpuBuffer
  /** Address of the value's bf16 copy, for a product that reads bf16; 0 if there is none. Records that such a product wants one. */
  rounded(value: Value): number
  /** Calls `write`, which writes to the buffer, with the address of the buffer's bf16 copy or 0. Creates the copy if products want one. */
  withRounded(buffer: CpuBuffer, write: (rounded: number) => void): void
  /** Rounds a buffer's elements to bf16, into the copy at this address. */
  round(rounded: number, buffer: CpuBuffer): void
  /** Updates the buffer's bf16 copy, if it has one. */
  updateRoundedCopy(buffer: CpuBuffer): void
  /** A new buffer with a copy of the elements of the value. */
  copied(value: Value): CpuBuffer
  /** Releases an intermediate result. */
  release(buffer: CpuBuffer): void
  /** The value's buffer with one more owner. */
  shared(value: Value): CpuBuffer
  /**
   * The op's attributes, encoded as the last arguments of its next kernel call. In a recording, every replay can replace them, so use them
   * for nothing else.
   */
  attrs<O extends OpName>(op: O, attrs: OpAttrs[O], encode: (attrs: OpAttrs[O]) => readonly number[]): readonly number[]
}

/** Creates the kernel of a primitive for one backend. */
export type PrimitiveFactory<P extends PrimitiveName> = (native: Native) => Kernel<PrimitiveAttrs[P]>
/** Creates the kernel of a fused op; the kernel returns `undefined` to decline a call. */
export type FusedFactory<F extends FusedName> = (native: Native) => FusedKernel<FusedAttrs[F]>

/** Address of a value's first element. */
export const pointerOf = (value: Value): number => (value.handle as CpuBuffer).pointer

/** The kernel variants for elements of 1, 2 and 4 bytes: `moe_<op>_b8`, `_b16`, `_b32`. */
export function bySize(native: Native, op: string): (dtype: DType) => NativeKernel {
  const kernels = [1, 2, 4].map(bytes => native.kernel(`moe_${op}_b${bytes * 8}`))
  return dtype => kernels[dtypeBytes[dtype] >> 1]
}

const overlap = (a: CpuBuffer, b: CpuBuffer): boolean =>
  a.pointer < b.pointer + b.bytes && b.pointer < a.pointer + a.bytes

/** Number of slots of a call: the thread count, then the arguments. */
const slotCount = 64

/** @param recording returns the graph that is being recorded, or null */
export function createNative(
  library: NativeLibrary,
  memory: Memory,
  threads: number,
  recording: () => Recording | null,
): Native {
  const slots = new Float64Array(new ArrayBuffer(slotCount * 8))
  const slotsAddress = library.address(slots.buffer)
  slots[0] = threads
  const copy = kernel('moe_copy')
  const cast = kernel('moe_cast_f32_bf16')
  const round = (rounded: number, buffer: CpuBuffer) => cast(rounded, buffer.pointer, buffer.bytes / 4)
  const multipliesBf16 = bf16Isas.has(library.isa)

  function kernel(name: string, common?: number): NativeKernel {
    let entry: ((slots: number) => number) | undefined
    return (...values) => {
      entry ??= library.entry(name)
      const graph = recording()
      if (graph !== null) {
        if (!graph.add(name, entry, [threads, ...values], common)) memory.freed.length = 0
        return
      }
      for (let i = 0; i < values.length; i++) slots[i + 1] = values[i]
      const status = entry(slotsAddress)
      if (status !== 0) throw failure(library, name, status)
    }
  }

  function copyOf(buffer: CpuBuffer): CpuBuffer {
    const fresh = memory.allocate(buffer.bytes)
    copy(fresh.pointer, buffer.pointer, buffer.bytes)
    return fresh
  }

  return {
    kernel,
    output(spec) {
      const buffer = memory.allocate(sizeOf(spec.shape) * dtypeBytes[spec.dtype])
      if (memory.freed.some(other => overlap(buffer, other))) recording()?.keepApart()
      return buffer
    },
    donated(value, writesRounded = false) {
      const buffer = value.handle as CpuBuffer
      return buffer.refs === 1 && (writesRounded || buffer.rounded === null) ? memory.share(buffer) : copyOf(buffer)
    },
    rounded(value) {
      if (!multipliesBf16) return 0
      const buffer = value.handle as CpuBuffer
      buffer.roundedWanted = true
      return buffer.rounded?.pointer ?? 0
    },
    withRounded(buffer, write) {
      // Not during a recording: the copy would be empty until the first replay, and products outside the graph would read it.
      const begins = buffer.rounded === null && buffer.roundedWanted
      if (!begins || recording() !== null || memory.belongsToGraph(buffer)) return write(buffer.rounded?.pointer ?? 0)
      const fresh = memory.allocate(buffer.bytes / 2)
      write(fresh.pointer)
      memory.attachRounded(buffer, fresh)
    },
    round,
    updateRoundedCopy(buffer) {
      if (buffer.rounded !== null) round(buffer.rounded.pointer, buffer)
    },
    copied: value => copyOf(value.handle as CpuBuffer),
    release: buffer => memory.release(buffer),
    shared: value => memory.share(value.handle as CpuBuffer),
    attrs(op, attrs, encode) {
      const values = encode(attrs)
      recording()?.vary({ op, attrs, encode: encode as RecordedAttrs['encode'], count: values.length })
      return values
    },
  }
}
