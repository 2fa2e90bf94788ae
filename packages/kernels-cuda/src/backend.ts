/** @file The backend: a device, its memory, one stream, and a table of kernels. */
import type {
  Backend,
  CaptureOptions,
  FusedKernels,
  Graph,
  Handle,
  HostArray,
  OpName,
  PrimitiveKernels,
  TensorSpec,
  Value,
} from '@moe/core'
import { dtypes, hostArray, MoeError, sizeOf } from '@moe/core'
import type { Device } from './driver/device.ts'
import { capture, type Recording } from './graph.ts'
import { type CudaInterop, createInterop } from './interop.ts'
import { fusedFactories, primitiveFactories } from './kernels/index.ts'
import type { CudaBuffer, Memory, MemoryStats } from './memory.ts'
import type { Cuda } from './native.ts'
import { type CudaOptions, openCuda } from './open.ts'
import type { Stream } from './stream.ts'

/** Memory use of a backend, and the number of kernels it has launched. */
export interface CudaStats extends MemoryStats {
  /** Number of kernels launched individually so far; replayed graphs do not count. */
  readonly launches: number
}

/** The backend that `createBackend` returns. It captures graphs, times the device and reports its properties. */
export interface CudaBackend extends Backend {
  /** Properties of the device. */
  readonly properties: Device
  /** Whether the kernels with Hopper's instructions are enabled. */
  readonly wgmma: boolean
  /** Version of the cuBLASLt used for dense products; undefined if it is not used. */
  readonly cublasLt: string | undefined
  /** Access to the device for other CUDA libraries. */
  readonly interop: CudaInterop
  stats(): CudaStats
  /** Returns cached memory that no tensor uses to the device. */
  trim(): Promise<void>
  /** Resolves to the milliseconds that the device takes for the work that `fn` launches. */
  elapsed(fn: () => void): Promise<number>
  write(tensor: Value, data: HostArray): void
  capture<T>(fn: () => T, options?: CaptureOptions): Graph<T>
}

/**
 * Opens the driver and a device and creates a backend.
 * @throws MoeError E_NO_BACKEND, with the reason, if there is no driver, no supported device or no kernels; E_CONFIG for an invalid option
 */
export async function createBackend(options: CudaOptions = {}): Promise<CudaBackend> {
  const opened = await openCuda(options)
  const { driver, device, context, modules, memory, stream, cuda } = opened
  const run: Runner = (op, fn) => {
    context.use()
    memory.begin(op)
    try {
      const result = fn()
      memory.end()
      return result
    } catch (error) {
      memory.rollBack()
      throw error
    }
  }

  const backend: CudaBackend = {
    name: 'kernels-cuda',
    device: `${device.name}, sm_${device.capability}, ${(device.totalMemory / 2 ** 30).toFixed(0)} GiB`,
    properties: device,
    wgmma: cuda.wgmma,
    cublasLt: cuda.cublasLt?.version,
    interop: createInterop(opened, run, () => backend),
    dtypes: new Set(dtypes),
    bf16Matmul: true,
    fp8Matmul: true,
    primitives: tabulate(primitiveFactories, cuda, run) as PrimitiveKernels,
    fused: tabulate(fusedFactories, cuda, run) as FusedKernels,
    upload: (data, shape, dtype) => run('', () => upload(memory, stream, opened.recording, data, { shape, dtype })),
    async download(value) {
      context.use()
      if (opened.recording !== null) throw whileRecording('download', 'read results after replay')
      const data = hostArray(value.dtype, sizeOf(value.shape))
      await stream.download((value.handle as CudaBuffer).pointer, data)
      return data
    },
    free(handle: Handle) {
      if (!context.open) return
      context.use()
      memory.release(handle as CudaBuffer)
    },
    async sync() {
      context.use()
      if (opened.recording !== null) throw whileRecording('sync', 'wait after replay')
      await stream.sync()
    },
    stats: () => ({ ...memory.stats(), launches: stream.launches }),
    async trim() {
      context.use()
      if (opened.recording !== null) throw whileRecording('trim', 'release memory before or after capture()')
      await stream.sync()
      // Another backend may have made its context current meanwhile.
      context.use()
      memory.trim()
    },
    async elapsed(fn) {
      context.use()
      if (opened.recording !== null) throw whileRecording('elapsed', 'time a replay')
      return stream.elapsed(fn)
    },
    write(tensor, data) {
      context.use()
      if (opened.recording !== null) throw whileRecording('write', 'write before replay')
      const buffer = tensor.handle as CudaBuffer
      if (data.byteLength !== buffer.bytes) throw wrongLength('write', data, tensor)
      memory.changed(buffer)
      stream.upload(buffer.pointer, data, 'write')
    },
    capture(fn, captureOptions = {}) {
      context.use()
      if (opened.recording !== null) throw whileRecording('capture', 'finish this capture before you start another')
      return capture(driver, context, memory, stream, fn, captureOptions, now => {
        opened.recording = now
      })
    },
    dispose() {
      if (!context.open) return
      context.use()
      memory.dispose()
      cuda.cublasLt?.dispose()
      modules.dispose()
      stream.dispose()
      context.release()
    },
  }
  return backend
}

type Runner = <T>(op: string, fn: () => T) => T
type AnyKernel = (inputs: readonly Value[], attrs: never, outputs: readonly TensorSpec[]) => Handle[] | undefined
type AnyFactory = (cuda: Cuda) => AnyKernel

/** Creates all kernels. Each frees its outputs if it fails. */
function tabulate(factories: object, cuda: Cuda, run: Runner): Record<string, AnyKernel> {
  const table: Record<string, AnyKernel> = {}
  for (const [name, factory] of Object.entries(factories)) {
    const kernel = (factory as AnyFactory)(cuda)
    table[name] = (inputs, attrs, outputs) => run(name as OpName, () => kernel(inputs, attrs, outputs))
  }
  return table
}

function upload(
  memory: Memory,
  stream: Stream,
  recording: Recording | null,
  data: HostArray,
  spec: TensorSpec,
): CudaBuffer {
  if (data.length !== sizeOf(spec.shape)) throw wrongLength('upload', data, spec)
  if (recording === null) {
    const buffer = memory.allocate(data.byteLength)
    stream.upload(buffer.pointer, data, 'upload')
    return buffer
  }
  const buffer = memory.allocateConstant(data.byteLength)
  recording.buffers.push(memory.share(buffer))
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
  recording.uploads.push({ pointer: buffer.pointer, data: bytes.slice() })
  return buffer
}

function wrongLength(op: string, data: HostArray, { shape, dtype }: TensorSpec): MoeError {
  const problem = `${data.length} elements of ${data.BYTES_PER_ELEMENT} bytes do not fit ${dtype} [${shape}]`
  return new MoeError({ code: 'E_SHAPE', op, problem })
}

function whileRecording(op: string, fix: string): MoeError {
  return new MoeError({ code: 'E_ATTR', op, problem: `${op} cannot be called while a graph is being captured`, fix })
}
