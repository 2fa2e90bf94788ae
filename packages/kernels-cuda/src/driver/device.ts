/** @file Chooses a device and reads its properties. */
import { MoeError } from '@moe/core'
import type { Driver } from './driver.ts'
import { fixes, status } from './status.ts'

/** Properties of a GPU. */
export interface Device {
  /** Its index among the devices visible through CUDA_VISIBLE_DEVICES. */
  readonly ordinal: number
  /** NVIDIA's name for it, for example `NVIDIA H200`. */
  readonly name: string
  /** Compute capability times ten: 80, 86, 89, 90, 100, 120. */
  readonly capability: number
  /** Number of streaming multiprocessors. */
  readonly multiprocessors: number
  /** Maximum dynamic shared memory of a block, in bytes. */
  readonly sharedMemory: number
  /** Size of its memory in bytes. */
  readonly totalMemory: number
  /** Whether it reads ordinary host memory directly (GH200), possibly after the call that starts the copy has returned. */
  readonly readsHostMemory: boolean
  /** CUDA version of the driver: 13000 is CUDA 13.0. */
  readonly driverVersion: number
}

/** Values of CUdevice_attribute. */
export const attribute = {
  multiprocessors: 16,
  major: 75,
  minor: 76,
  sharedMemoryOptIn: 97,
  usesHostPageTables: 100,
} as const

const leastCapability = 80

/**
 * Initializes the driver and chooses a device.
 * @param ordinal Index among the devices visible through CUDA_VISIBLE_DEVICES; default: the first supported one.
 * @throws MoeError E_NO_BACKEND, with the reason, if there is no usable device
 */
export function findDevice(driver: Driver, ordinal: number | undefined): Device {
  const { call } = driver
  const started = call.cuInit(0)
  if (started === status.noDevice)
    throw none('the driver found no device', 'check `nvidia-smi` and CUDA_VISIBLE_DEVICES')
  if (started !== status.success) {
    const fix = fixes[started] ?? 'check that `nvidia-smi` works'
    throw none(`the driver failed to initialize: ${driver.errorName(started)} (${started})`, fix)
  }
  const driverVersion = driver.out(word => call.cuDriverGetVersion(word), 'kernels-cuda')
  const count = driver.out(word => call.cuDeviceGetCount(word), 'kernels-cuda')
  if (count === 0) throw none('the driver found no device', 'check `nvidia-smi` and CUDA_VISIBLE_DEVICES')
  if (ordinal !== undefined && !(Number.isInteger(ordinal) && ordinal >= 0 && ordinal < count)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'kernels-cuda',
      problem: `device is ${ordinal}, but there are ${count} devices`,
      fix: `expected 0 to ${count - 1}`,
    })
  }
  const devices = (ordinal === undefined ? [...Array(count).keys()] : [ordinal]).map(index =>
    describe(driver, index, driverVersion),
  )
  const usable = devices.find(({ capability }) => capability >= leastCapability)
  if (usable !== undefined) return usable
  throw none(
    `${devices.map(({ name, capability }) => `${name} has compute capability ${(capability / 10).toFixed(1)}`).join(', ')}, but 8.0 (Ampere) or newer is required`,
    'use @moe/kernels-cpu',
  )
}

function describe(driver: Driver, ordinal: number, driverVersion: number): Device {
  const { call } = driver
  const device = driver.out(word => call.cuDeviceGet(word, ordinal), 'kernels-cuda')
  const get = (code: number) => driver.out(word => call.cuDeviceGetAttribute(word, code, device), 'kernels-cuda')
  const name = new Uint8Array(256)
  driver.check(call.cuDeviceGetName(name, name.length, device), 'kernels-cuda')
  return {
    ordinal,
    name: new TextDecoder().decode(name.subarray(0, name.indexOf(0))),
    capability: get(attribute.major) * 10 + get(attribute.minor),
    // For tests: tile sizes depend on it, so that small problems on a device that claims to be small use the code paths of large ones.
    multiprocessors: Number(process.env['MOE_CUDA_MULTIPROCESSORS']) || get(attribute.multiprocessors),
    sharedMemory: get(attribute.sharedMemoryOptIn),
    totalMemory: driver.out(word => call.cuDeviceTotalMem(word, device), 'kernels-cuda'),
    readsHostMemory: get(attribute.usesHostPageTables) !== 0,
    driverVersion,
  }
}

function none(problem: string, fix: string): MoeError {
  return new MoeError({ code: 'E_NO_BACKEND', op: 'kernels-cuda', problem, fix })
}
