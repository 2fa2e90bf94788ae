/** @file The backend: native memory and a table of kernels. */
import { availableParallelism, cpus } from 'node:os'
import type {
  Backend,
  CaptureOptions,
  FusedKernels,
  Graph,
  Handle,
  HostArray,
  PrimitiveKernels,
  TensorSpec,
  Value,
} from '@moe/core'
import { checkOptions, dtypes, hostArray, MoeError, sizeOf } from '@moe/core'
import { capture } from './graph.ts'
import { fusedFactories, primitiveFactories } from './kernels/index.ts'
import { bf16Isas, type Isa, isas, loadLibrary, type NativeLibrary } from './load.ts'
import { type CpuBuffer, Memory, type MemoryStats } from './memory.ts'
import { createNative, type Native } from './native.ts'
import { counterOf, profiling } from './profile.ts'
import type { Recording } from './recording.ts'

/** Options of `createBackend`. */
export interface CpuOptions {
  /** Number of threads that kernels use, including the calling thread. Default: MOE_NUM_THREADS, or the CPUs available to this process, at most 256. */
  readonly threads?: number | undefined
  /** Highest instruction set to use. Default: MOE_CPU_ISA, or the fastest that the CPU supports. */
  readonly isa?: Isa | undefined
  /** Maximum total size of all tensors in bytes; an op that would exceed it throws E_OUT_OF_MEMORY. Default: no limit. */
  readonly memoryLimit?: number | undefined
  /** For tests: puts guard bytes around every buffer, which `checkGuards` checks, and initializes outputs to NaN. Slow. */
  readonly guarded?: boolean | undefined
}

/** The backend that `createBackend` returns. It captures graphs and reports its instruction set, threads and memory. */
export interface CpuBackend extends Backend {
  /** Instruction set of the kernels. */
  readonly isa: Isa
  /** Number of threads that kernels use, including the calling thread. */
  readonly threads: number
  /** Memory in use, and memory cached for later tensors. */
  stats(): MemoryStats
  /** Returns cached memory that no tensor uses to the system. */
  trim(): void
  write(tensor: Value, data: HostArray): void
  capture<T>(fn: () => T, options?: CaptureOptions): Graph<T>
  /** Checks the guard bytes of all live buffers; requires `guarded`. @throws Error if a kernel wrote outside a buffer */
  checkGuards(): void
}

/**
 * Loads the native library and creates a backend.
 * @throws MoeError E_NO_BACKEND if there is no library for this machine, E_CONFIG for an invalid option
 */
export async function createBackend(options: CpuOptions = {}): Promise<CpuBackend> {
  checkOptions('createBackend', options, { threads: true, isa: true, memoryLimit: true, guarded: true })
  const library = await loadLibrary(chosenIsa(options))
  const threads = options.threads ?? threadsFromEnvironment() ?? defaultThreads(library)
  if (!isThreadCount(threads)) throw invalid('threads', threads, `1 to ${mostThreads}`)
  const { memoryLimit } = options
  if (memoryLimit !== undefined && !(memoryLimit >= 0)) throw invalid('memoryLimit', memoryLimit, 'a number of bytes')
  const memory = new Memory(library, { limit: memoryLimit, guarded: options.guarded })
  let recording: Recording | null = null
  const native = createNative(library, memory, threads, () => recording)
  const primitives = tabulate(primitiveFactories, native, memory) as PrimitiveKernels
  const fused = tabulate(fusedFactories, native, memory) as FusedKernels
  return {
    name: 'kernels-cpu',
    device: `${cpuName()}, ${isaLabels[library.isa]}, ${threads} ${threads === 1 ? 'thread' : 'threads'}`,
    dtypes: new Set(dtypes),
    bf16Matmul: bf16Isas.has(library.isa),
    fp8Matmul: true,
    isa: library.isa,
    threads,
    primitives,
    fused,
    upload: (data, shape, dtype) => upload(library, memory, recording, data, { shape, dtype }),
    async download(value) {
      if (recording !== null) throw whileRecording('download', 'read results after replay')
      memory.needAlive()
      return download(library, value)
    },
    free: (handle: Handle) => memory.release(handle as CpuBuffer),
    async sync() {},
    write(tensor, data) {
      if (recording !== null) throw whileRecording('write', 'write before replay')
      memory.needAlive()
      const buffer = tensor.handle as CpuBuffer
      if (data.byteLength !== buffer.bytes) throw wrongLength('write', data, tensor)
      native.withRounded(buffer, rounded => {
        if (buffer.bytes > 0) library.upload(buffer.pointer, data, buffer.bytes)
        if (rounded !== 0) native.round(rounded, buffer)
      })
    },
    capture(fn, captureOptions = {}) {
      if (recording !== null) throw whileRecording('capture', 'finish this capture before you start another')
      return capture(library, memory, native, fn, captureOptions, now => {
        recording = now
      })
    },
    stats: () => memory.stats(),
    dispose: () => memory.dispose(),
    trim: () => memory.trim(),
    checkGuards: () => memory.checkGuards(),
  }
}

/** The name of the CPU; its architecture on Linux arm64, where Node reports the model as unknown. */
function cpuName(): string {
  const model = cpus()[0]?.model.trim()
  return model && model !== 'unknown' ? model : process.arch
}

const isaLabels: Readonly<Record<Isa, string>> = {
  baseline: process.arch === 'arm64' ? 'NEON' : 'SSE2',
  avx2: 'AVX2',
  avx512: 'AVX-512',
  avx512vnni: 'AVX-512 VNNI',
  avx512bf16: 'AVX-512 BF16',
  dotprod: 'NEON DotProd',
  bf16: 'NEON BF16',
}

function chosenIsa({ isa }: CpuOptions): Isa | undefined {
  const named = isa ?? (process.env['MOE_CPU_ISA'] || undefined)
  if (named === undefined) return undefined
  if ((isas as readonly string[]).includes(named)) return named as Isa
  throw invalid(isa === undefined ? 'MOE_CPU_ISA' : 'isa', named, isas.join(', '))
}

function threadsFromEnvironment(): number | undefined {
  const named = process.env['MOE_NUM_THREADS']
  if (!named) return undefined
  const threads = Number(named)
  if (!isThreadCount(threads)) throw invalid('MOE_NUM_THREADS', named, `1 to ${mostThreads}`)
  return threads
}

/** As many as the pool in native/parallel.cc has room for. Machines may have more CPUs. */
const mostThreads = 256

/** Newer versions of Node also know the limits of nested control groups, such as systemd's, and of version 1. */
const defaultThreads = (library: NativeLibrary): number =>
  Math.min(library.defaultThreads, availableParallelism(), mostThreads)

const isThreadCount = (count: number): boolean => Number.isInteger(count) && count >= 1 && count <= mostThreads

function invalid(option: string, value: unknown, allowed: string): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: 'kernels-cpu',
    problem: `${option} is ${value}`,
    fix: `expected ${allowed}`,
    details: { option, value },
  })
}

type AnyKernel = (inputs: readonly Value[], attrs: never, outputs: readonly TensorSpec[]) => Handle[] | undefined
type AnyFactory = (native: Native) => AnyKernel

/** Creates all kernels. Each frees its outputs if it fails, and is timed while profiling is on. */
function tabulate(factories: object, native: Native, memory: Memory): Record<string, AnyKernel> {
  const table: Record<string, AnyKernel> = {}
  for (const [name, factory] of Object.entries(factories)) {
    const kernel = (factory as AnyFactory)(native)
    const counter = counterOf(name)
    table[name] = (inputs, attrs, outputs) => {
      memory.begin()
      try {
        if (!profiling.on) return kernel(inputs, attrs, outputs)
        const started = performance.now()
        const result = kernel(inputs, attrs, outputs)
        counter.milliseconds += performance.now() - started
        counter.calls++
        return result
      } catch (error) {
        memory.rollBack()
        throw error
      }
    }
  }
  return table
}

function upload(
  library: NativeLibrary,
  memory: Memory,
  recording: Recording | null,
  data: HostArray,
  spec: TensorSpec,
): CpuBuffer {
  if (data.length !== sizeOf(spec.shape)) throw wrongLength('upload', data, spec)
  memory.begin()
  const buffer = recording === null ? memory.allocate(data.byteLength) : memory.allocateConstant(data.byteLength)
  if (data.length > 0) library.upload(buffer.pointer, data, data.byteLength)
  // The graph owns its constants, even if the caller frees them.
  recording?.buffers.push(memory.share(buffer))
  return buffer
}

function wrongLength(op: string, data: HostArray, { shape, dtype }: TensorSpec): MoeError {
  const problem = `${data.length} elements of ${data.BYTES_PER_ELEMENT} bytes do not fit ${dtype} [${shape}]`
  return new MoeError({ code: 'E_SHAPE', op, problem })
}

function whileRecording(op: string, fix: string): MoeError {
  return new MoeError({ code: 'E_ATTR', op, problem: `${op} cannot be called while a graph is being captured`, fix })
}

function download(library: NativeLibrary, value: Value): HostArray {
  const data = hostArray(value.dtype, sizeOf(value.shape))
  if (data.length > 0) library.download(data, (value.handle as CpuBuffer).pointer, data.byteLength)
  return data
}
