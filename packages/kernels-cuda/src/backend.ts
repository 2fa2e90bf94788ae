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
import { type Device, findDevice } from './driver/device.ts'
import { type Driver, openDriver } from './driver/driver.ts'
import { status } from './driver/status.ts'
import { capture, type Recording } from './graph.ts'
import { fusedFactories, primitiveFactories } from './kernels/index.ts'
import { type CudaBuffer, Memory, type MemoryStats } from './memory.ts'
import { Modules } from './modules.ts'
import { type Cuda, createCuda } from './native.ts'
import { Stream } from './stream.ts'
import { tensorMaps } from './tensor-map.ts'

export interface CudaOptions {
  /** Which device, counted among those that CUDA_VISIBLE_DEVICES leaves. Default: MOE_CUDA_DEVICE, or the first that is new enough. */
  readonly device?: number
  /** Most bytes of all tensors together; an op that needs more throws E_OUT_OF_MEMORY. Default: no limit but the device's. */
  readonly memoryLimit?: number
  /** For checkers such as compute-sanitizer: every tensor is an allocation of its own. Slow. */
  readonly guarded?: boolean
  /**
   * Products and attention forward in bf16 by Hopper's instructions, where the device is one (compute capability 9.0). They have not run on one yet.
   * Default: whether MOE_CUDA_WGMMA is 1.
   */
  readonly wgmma?: boolean
  /** Path of the driver's library. Default: MOE_CUDA_DRIVER, or the installed one. */
  readonly driver?: string
  /** Folder with the fatbins. Default: MOE_CUDA_KERNELS, or the package's own. */
  readonly kernels?: string
}

export interface CudaStats extends MemoryStats {
  /** Kernels launched one by one so far; a replayed graph counts none. */
  readonly launches: number
}

export interface CudaBackend extends Backend {
  /** What it runs on. */
  readonly properties: Device
  /** Whether products are Hopper's. */
  readonly wgmma: boolean
  stats(): CudaStats
  /** Gives memory that no tensor uses back to the device. */
  trim(): Promise<void>
  /** Milliseconds that the device takes for what `fn` launches. */
  elapsed(fn: () => void): Promise<number>
  write(tensor: Value, data: HostArray): void
  capture<T>(fn: () => T, options?: CaptureOptions): Graph<T>
}

/** The compute capability, times ten, that modules `<op>-sm90a` are for. */
const hopper = 90

/**
 * Opens the driver and a device, and makes a backend of them.
 * @throws MoeError E_NO_BACKEND without a driver, a device that is new enough, or kernels, with the reason; E_CONFIG for an impossible option.
 */
export async function createBackend(options: CudaOptions = {}): Promise<CudaBackend> {
  const driver = await openDriver(options.driver)
  const device = findDevice(driver, options.device ?? deviceFromEnvironment())
  const context = new Context(driver, device.ordinal)
  const modules = new Modules(driver, device, options.kernels)
  modules.probe()
  const stream = new Stream(driver)
  const memory = new Memory(driver, stream.handle, { limit: options.memoryLimit, guarded: options.guarded })
  let recording: Recording | null = null
  const wgmma =
    (options.wgmma ?? process.env['MOE_CUDA_WGMMA'] === '1') &&
    device.capability === hopper &&
    modules.has('matmul-sm90a') &&
    driver.has('cuTensorMapEncodeTiled')
  const cuda = createCuda(device, memory, modules, stream, () => recording, { wgmma, tensorMap: tensorMaps(driver) })
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

  return {
    name: 'kernels-cuda',
    device: `${device.name}, sm_${device.capability}, ${(device.totalMemory / 2 ** 30).toFixed(0)} GiB`,
    properties: device,
    wgmma,
    dtypes: new Set(dtypes),
    bf16Matmul: true,
    primitives: tabulate(primitiveFactories, cuda, run) as PrimitiveKernels,
    fused: tabulate(fusedFactories, cuda, run) as FusedKernels,
    upload: (data, shape, dtype) => run('', () => upload(memory, stream, recording, data, { shape, dtype })),
    async download(value) {
      context.use()
      if (recording !== null) throw whileRecording('download', 'read results after replay')
      const data = hostArray(value.dtype, sizeOf(value.shape))
      await stream.download((value.handle as CudaBuffer).pointer, data)
      return data
    },
    free(handle: Handle) {
      context.use()
      memory.release(handle as CudaBuffer)
    },
    async sync() {
      context.use()
      if (recording !== null) throw whileRecording('sync', 'wait after replay')
      await stream.sync()
    },
    stats: () => ({ ...memory.stats(), launches: stream.launches }),
    async trim() {
      context.use()
      await stream.sync()
      memory.trim()
    },
    elapsed(fn) {
      context.use()
      return stream.elapsed(fn)
    },
    write(tensor, data) {
      context.use()
      if (recording !== null) throw whileRecording('write', 'write before replay')
      const buffer = tensor.handle as CudaBuffer
      if (data.byteLength !== buffer.bytes) throw wrongLength('write', data, tensor)
      stream.upload(buffer.pointer, data, 'write')
    },
    capture(fn, captureOptions = {}) {
      context.use()
      if (recording !== null) throw whileRecording('capture', 'record one graph after the other')
      return capture(driver, memory, stream, fn, captureOptions, now => {
        recording = now
      })
    },
    dispose() {
      context.use()
      memory.dispose()
      modules.dispose()
      stream.dispose()
      context.release()
    },
  }
}

function deviceFromEnvironment(): number | undefined {
  const named = process.env['MOE_CUDA_DEVICE']
  if (!named) return undefined
  const device = Number(named)
  if (Number.isInteger(device) && device >= 0) return device
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'kernels-cuda',
    problem: `MOE_CUDA_DEVICE is ${named}`,
    fix: 'set it to the number of a device, from 0',
  })
}

/** The device's primary context, which other libraries of the process share. Several backends take turns in being current. */
class Context {
  static #current = 0
  readonly #driver: Driver
  readonly #ordinal: number
  readonly #handle: number
  #retained = true

  constructor(driver: Driver, ordinal: number) {
    this.#driver = driver
    this.#ordinal = ordinal
    const device = driver.out(word => driver.call.cuDeviceGet(word, ordinal), 'kernels-cuda')
    const word = new BigUint64Array(1)
    const code = driver.call.cuDevicePrimaryCtxRetain(word, device)
    // Somebody else has the device for himself, or its memory is full: another backend may do.
    if (code !== status.success) throw unusable(driver, code, ordinal)
    this.#handle = Number(word[0])
    // Not by `use`: the number may be that of a context that is gone.
    driver.check(driver.call.cuCtxSetCurrent(this.#handle), 'kernels-cuda')
    Context.#current = this.#handle
  }

  use(): void {
    if (Context.#current === this.#handle) return
    this.#driver.check(this.#driver.call.cuCtxSetCurrent(this.#handle), 'kernels-cuda')
    Context.#current = this.#handle
  }

  release(): void {
    if (!this.#retained) return
    this.#retained = false
    this.#driver.call.cuDevicePrimaryCtxRelease(this.#ordinal)
  }
}

function unusable(driver: Driver, code: number, ordinal: number): MoeError {
  return new MoeError({
    code: 'E_NO_BACKEND',
    op: 'kernels-cuda',
    problem: `device ${ordinal} cannot be used: the driver says ${driver.errorName(code)} (${code})`,
    fix: `see with nvidia-smi who uses it, choose another with MOE_CUDA_DEVICE, or use @moe/kernels-cpu`,
  })
}

type Runner = <T>(op: string, fn: () => T) => T
type AnyKernel = (inputs: readonly Value[], attrs: never, outputs: readonly TensorSpec[]) => Handle[] | undefined
type AnyFactory = (cuda: Cuda) => AnyKernel

/** Every factory's kernel, which takes its outputs back when it fails. */
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
  const problem = `${data.length} elements of ${data.BYTES_PER_ELEMENT} bytes for ${dtype} [${shape}]`
  return new MoeError({ code: 'E_SHAPE', op, problem })
}

function whileRecording(op: string, fix: string): MoeError {
  return new MoeError({ code: 'E_ATTR', op, problem: `${op} while a graph is recorded`, fix })
}
