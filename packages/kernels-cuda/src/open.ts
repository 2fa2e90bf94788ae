/** @file Opens a device: driver, context, memory, one stream, kernels, and the interface that launchers use. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import { openCublasLt } from './cublas-lt/library.ts'
import { CublasLt } from './cublas-lt/products.ts'
import { Context } from './driver/context.ts'
import { type Device, findDevice } from './driver/device.ts'
import { type Driver, importKoffi, openDriver } from './driver/driver.ts'
import type { Recording } from './graph.ts'
import { Memory } from './memory.ts'
import { Modules } from './modules.ts'
import { type Cuda, createCuda, type HopperOp, hopperOps } from './native.ts'
import { Stream } from './stream.ts'
import { tensorMaps } from './tensor-map.ts'

/** Options of `createBackend`. */
export interface CudaOptions {
  /** Index of the device among those visible through CUDA_VISIBLE_DEVICES. Default: MOE_CUDA_DEVICE, or the first supported one. */
  readonly device?: number | undefined
  /** Maximum total size of all tensors in bytes; an op that would exceed it throws E_OUT_OF_MEMORY. Default: limited only by the device. */
  readonly memoryLimit?: number | undefined
  /** For checkers such as compute-sanitizer: makes every tensor a separate allocation. Slow; graphs cannot be captured. */
  readonly guarded?: boolean | undefined
  /**
   * Use kernels with Hopper's own instructions, if the device has compute capability 9.0, for matrix products (including the logits of
   * cross-entropy) and attention in bf16 and fp8. They have not run on a device yet. Default: whether MOE_CUDA_WGMMA is set, and not 0. If that
   * is a list of ops (`attention,matmul`), only these use them, whatever this option says.
   */
  readonly wgmma?: boolean | undefined
  /**
   * Use NVIDIA's cuBLASLt for dense products, if it is installed and fits the driver. `true`: for all except those of few rows, so that the same
   * sizes always use the same code. `'measured'`: where it is faster than our own kernels, measured at the first product of each size, which
   * waits for the device. A path: load this library and use it as with `true`. Default: MOE_CUDA_CUBLASLT (1, measured, or a path), or false.
   */
  readonly cublasLt?: boolean | string | undefined
  /** Path of the driver's library. Default: MOE_CUDA_DRIVER, or the installed driver. */
  readonly driver?: string | undefined
  /** Folder of the fatbins. Default: MOE_CUDA_KERNELS, or the package's own. */
  readonly kernels?: string | undefined
}

const names: OptionNames<CudaOptions> = {
  device: true,
  memoryLimit: true,
  guarded: true,
  wgmma: true,
  cublasLt: true,
  driver: true,
  kernels: true,
}

/** An open device and everything that belongs to it. */
export interface Opened {
  readonly driver: Driver
  readonly device: Device
  readonly context: Context
  readonly modules: Modules
  readonly memory: Memory
  readonly stream: Stream
  readonly cuda: Cuda
  /** The graph that is being captured, if any. */
  recording: Recording | null
}

/** Compute capability, times ten, of the devices that modules `<op>-sm90a` are for. */
const hopper = 90

/** @throws MoeError as `createBackend` does. */
export async function openCuda(options: CudaOptions): Promise<Opened> {
  checkOptions('createBackend', options, names)
  const { memoryLimit } = options
  if (memoryLimit !== undefined && !(memoryLimit >= 0)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'kernels-cuda',
      problem: `memoryLimit is ${memoryLimit}`,
      fix: 'expected a number of bytes',
    })
  }
  const asked = hopperOpsFromEnvironment()
  const choice = options.cublasLt ?? cublasLtFromEnvironment()
  const driver = await openDriver(options.driver)
  // Before the context is made current: while this waits, another backend might make its own current.
  const koffi = choice === false ? undefined : await importKoffi()
  const device = findDevice(driver, options.device ?? deviceFromEnvironment())
  const context = new Context(driver, device.ordinal)
  try {
    const modules = new Modules(driver, device, options.kernels)
    modules.probe()
    const stream = new Stream(driver, context, device)
    const memory = new Memory(driver, stream.handle, { limit: memoryLimit, guarded: options.guarded })
    const wgmma =
      (options.wgmma ?? asked.length > 0) &&
      device.capability === hopper &&
      modules.has('matmul-sm90a') &&
      driver.has('cuTensorMapEncodeTiled')
    const measured = choice === 'measured'
    const path = typeof choice === 'string' && !measured ? choice : undefined
    const library = koffi && openCublasLt(koffi, device, path)
    const cublasLt =
      library && new CublasLt(library, driver, memory, stream, { measured, recording: () => opened.recording !== null })
    const cuda = createCuda(device, memory, modules, stream, () => opened.recording, {
      wgmma,
      onHopper: op => wgmma && (asked.length === 0 || asked.includes(op)),
      cublasLt,
      tensorMap: tensorMaps(driver),
    })
    const opened: Opened = { driver, device, context, modules, memory, stream, cuda, recording: null }
    return opened
  } catch (error) {
    // Otherwise a process that continues without this backend would keep the device's memory that a context takes.
    context.release()
    throw error
  }
}

/** The ops for which MOE_CUDA_WGMMA enables Hopper's kernels. */
function hopperOpsFromEnvironment(): readonly HopperOp[] {
  const value = process.env['MOE_CUDA_WGMMA']
  if (!value || value === '0') return []
  if (value === '1') return hopperOps
  const found = value.split(',')
  const unknown = found.filter(op => !(hopperOps as readonly string[]).includes(op))
  if (unknown.length === 0) return found as HopperOp[]
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'kernels-cuda',
    problem: `MOE_CUDA_WGMMA contains unknown ops: ${unknown.join(', ')}`,
    fix: `set it to 1, 0, or some of ${hopperOps.join(',')}`,
  })
}

function cublasLtFromEnvironment(): boolean | string {
  const value = process.env['MOE_CUDA_CUBLASLT']
  if (!value || value === '0') return false
  return value === '1' ? true : value
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
    fix: 'set it to the index of a device, starting at 0',
  })
}
