/** @file `webgpuBackend`: core's Backend on a WebGPU device. */
import { type Backend, checkOptions, dtypeBytes, MoeError, sizeOf, viewBytes } from '@moe/core'
import { Commands } from './commands.ts'
import { bufferOf, DeviceOps, supported } from './device-ops.ts'
import type { GpuDevice, GpuLimits } from './gpu.ts'
import { fusedOn, primitivesOn } from './kernels/index.ts'
import { type Buffer, Memory } from './memory.ts'
import { openDevice } from './open-device.ts'

/** Options of `webgpuBackend`. */
export interface WebGpuOptions {
  /** Name of the device, for display. Default: `WebGPU`. */
  readonly name?: string | undefined
}

/** Options of `createBackend`. */
export interface CreateWebGpuOptions {
  /** Also accept a GPU that is emulated by the processor (SwiftShader), for tests. Any other backend is faster. Default: false. */
  readonly software?: boolean | undefined
}

/** Limits that kernels need: those guaranteed by every device that is not in compatibility mode. */
const needed: Partial<GpuLimits> = {
  maxStorageBuffersPerShaderStage: 8,
  maxComputeInvocationsPerWorkgroup: 256,
  maxComputeWorkgroupSizeX: 256,
  maxComputeWorkgroupStorageSize: 16_384,
}

/**
 * Creates a backend on the GPU of the browser or of Deno, or in Node on the one that the npm package `webgpu` finds. Used by `firstAvailable`.
 * @throws MoeError E_NO_BACKEND if there is no WebGPU or no GPU for it
 */
export async function createBackend(options: CreateWebGpuOptions = {}): Promise<Backend> {
  checkOptions('createBackend', options, { software: true })
  const { device, name } = await openDevice(options.software === true)
  return webgpuBackend(device, { name })
}

/**
 * Creates a backend on an existing device, such as one that a page draws with; `dispose` destroys the device. Supports all dtypes except f16.
 * @throws MoeError E_UNSUPPORTED if the device's limits are below WebGPU's defaults
 */
export function webgpuBackend(device: GpuDevice, options: WebGpuOptions = {}): Backend {
  checkOptions('webgpuBackend', options, { name: true })
  checkLimits(device.limits)
  const commands = new Commands(device)
  const memory = new Memory(device, commands)
  const gpu = new DeviceOps(memory, commands)
  return {
    name: 'kernels-webgpu',
    device: options.name ?? 'WebGPU',
    dtypes: supported,
    bf16Matmul: false,
    fp8Matmul: false,
    primitives: freeingOnFailure(memory, primitivesOn(gpu)),
    fused: freeingOnFailure(memory, fusedOn(gpu)),
    upload(data, shape, dtype) {
      const y = gpu.output('upload', { shape, dtype })
      // Uploads whole words; the bytes after the last element are not used.
      const whole = data.byteLength % 4 === 0 ? data : new Uint8Array(y.bytes)
      if (whole !== data) (whole as Uint8Array).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength))
      commands.upload(whole, y.gpu)
      return y
    },
    async download(value) {
      const { gpu: from, bytes } = bufferOf(value)
      const read = await commands.download(from, bytes)
      return viewBytes(value.dtype, new Uint8Array(read, 0, sizeOf(value.shape) * dtypeBytes[value.dtype]))
    },
    free: handle => memory.release(handle as Buffer),
    sync: () => commands.wait(),
    stats: () => memory.stats(),
    trim: () => memory.trim(),
    dispose() {
      memory.dispose()
      commands.dispose()
    },
  }
}

/** The same kernels; one that fails frees what it has allocated. */
function freeingOnFailure<Kernels extends object>(memory: Memory, kernels: Kernels): Kernels {
  const wrapped = Object.entries(kernels as Record<string, (...args: unknown[]) => unknown>).map(
    ([name, kernel]) => [name, (...args: unknown[]) => memory.during(() => kernel(...args))] as const,
  )
  return Object.fromEntries(wrapped) as Kernels
}

function checkLimits(limits: GpuLimits): void {
  const short = Object.entries(needed).flatMap(([name, least]) => {
    const given = limits[name as keyof GpuLimits]
    return given < least ? [`${name} ${given}, but kernels need ${least}`] : []
  })
  if (short.length === 0) return
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op: 'webgpuBackend',
    problem: `the device has ${short.join(', ')}`,
    fix: 'request the adapter without featureLevel "compatibility"',
  })
}
