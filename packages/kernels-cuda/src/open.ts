/** @file Opening a device: driver, context, memory, one stream, kernels, and what launchers see of them. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import { openCublasLt } from './cublas-lt/library.ts'
import { CublasLt } from './cublas-lt/products.ts'
import { Context } from './driver/context.ts'
import { type Device, findDevice } from './driver/device.ts'
import { type Driver, openDriver } from './driver/driver.ts'
import type { Recording } from './graph.ts'
import { Memory } from './memory.ts'
import { Modules } from './modules.ts'
import { type Cuda, createCuda, type HopperOp, hopperOps } from './native.ts'
import { Stream } from './stream.ts'
import { tensorMaps } from './tensor-map.ts'

/** Device, memory and libraries of a backend. */
export interface CudaOptions {
  /** Which device, counted among those that CUDA_VISIBLE_DEVICES leaves. Default: MOE_CUDA_DEVICE, or the first that is new enough. */
  readonly device?: number
  /** Most bytes of all tensors together; an op that needs more throws E_OUT_OF_MEMORY. Default: no limit but the device's. */
  readonly memoryLimit?: number
  /** For checkers such as compute-sanitizer: every tensor is an allocation of its own. Slow. */
  readonly guarded?: boolean
  /**
   * Products, cross-entropy's logits included, and attention in bf16 by Hopper's instructions, where the device is one (compute capability 9.0).
   * They have not run on one yet.
   * Default: whether MOE_CUDA_WGMMA is set, but to 0; where it is a list of ops (`attention,matmul`), only these are, whatever is said here.
   */
  readonly wgmma?: boolean
  /**
   * NVIDIA's cuBLASLt for dense products, where it is installed and fits the driver: `true` for all but those of few rows, so that the same sizes
   * always go the same way; `'measured'` for those where it is faster than our own kernels, which is tried at the first product of each size and
   * waits for the device then; or the path of its library, as `true`. Default: MOE_CUDA_CUBLASLT (1, measured, or a path), or false.
   */
  readonly cublasLt?: boolean | string
  /** Path of the driver's library. Default: MOE_CUDA_DRIVER, or the installed one. */
  readonly driver?: string
  /** Folder with the fatbins. Default: MOE_CUDA_KERNELS, or the package's own. */
  readonly kernels?: string
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

/** A device that is open. */
export interface Opened {
  readonly driver: Driver
  readonly device: Device
  readonly context: Context
  readonly modules: Modules
  readonly memory: Memory
  readonly stream: Stream
  readonly cuda: Cuda
  /** The graph that is being recorded. */
  recording: Recording | null
}

/** The compute capability, times ten, that modules `<op>-sm90a` are for. */
const hopper = 90

/** @throws MoeError as `createBackend` does. */
export async function openCuda(options: CudaOptions): Promise<Opened> {
  checkOptions('createBackend', options, names)
  const asked = hopperOpsFromEnvironment()
  const driver = await openDriver(options.driver)
  const device = findDevice(driver, options.device ?? deviceFromEnvironment())
  const context = new Context(driver, device.ordinal)
  const modules = new Modules(driver, device, options.kernels)
  modules.probe()
  const stream = new Stream(driver, device)
  const memory = new Memory(driver, stream.handle, { limit: options.memoryLimit, guarded: options.guarded })
  const wgmma =
    (options.wgmma ?? asked.length > 0) &&
    device.capability === hopper &&
    modules.has('matmul-sm90a') &&
    driver.has('cuTensorMapEncodeTiled')
  const choice = options.cublasLt ?? cublasLtFromEnvironment()
  const measured = choice === 'measured'
  const path = typeof choice === 'string' && !measured ? choice : undefined
  const library = choice === false ? undefined : await openCublasLt(device, path)
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
}

/** Which ops' kernels for Hopper MOE_CUDA_WGMMA asks for. */
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
    problem: `MOE_CUDA_WGMMA names ${unknown.join(', ')}`,
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
    fix: 'set it to the number of a device, from 0',
  })
}
