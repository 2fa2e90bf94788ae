/** @file `webgpuBackend`: core's Backend on a device of WebGPU. */
import { type Backend, checkOptions, dtypeBytes, MoeError, sizeOf, viewBytes } from '@moe/core'
import { Commands } from './commands.ts'
import { bufferOf, DeviceOps, supported } from './device-ops.ts'
import type { GpuDevice, GpuLimits } from './gpu.ts'
import { fusedOn, primitivesOn } from './kernels/index.ts'
import { type Buffer, Memory } from './memory.ts'
import { openDevice } from './open-device.ts'

/** How a backend calls itself. */
export interface WebGpuOptions {
  /** What it runs on, for people. Default what the adapter says. */
  readonly name?: string
}

/** Which GPU is taken. */
export interface CreateWebGpuOptions {
  /** Take one that is computed by the processor (SwiftShader), too: for tests. Any other backend is faster. Default false. */
  readonly software?: boolean
}

/** What kernels need: what WebGPU promises of every device that is not in its compatibility mode. */
const needed: Partial<GpuLimits> = {
  maxStorageBuffersPerShaderStage: 8,
  maxComputeInvocationsPerWorkgroup: 256,
  maxComputeWorkgroupSizeX: 256,
  maxComputeWorkgroupStorageSize: 16_384,
}

/**
 * For `firstAvailable`: the GPU of the browser, of Deno, or in Node what the npm package `webgpu` finds.
 * @throws MoeError E_NO_BACKEND: no WebGPU here, or no GPU for it
 */
export async function createBackend(options: CreateWebGpuOptions = {}): Promise<Backend> {
  checkOptions('createBackend', options, { software: true })
  const { device, name } = await openDevice(options.software === true)
  return webgpuBackend(device, { name })
}

/**
 * A backend on a device that is there already, such as one that a page draws with; `dispose` destroys the device. dtypes: all but f16.
 * @throws MoeError E_UNSUPPORTED: the device's limits are below the defaults of WebGPU
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
    primitives: primitivesOn(gpu),
    fused: fusedOn(gpu),
    upload(data, shape, dtype) {
      const y = gpu.output('upload', { shape, dtype })
      // Whole words: what is behind the last element means nothing.
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

function checkLimits(limits: GpuLimits): void {
  const short = Object.entries(needed).flatMap(([name, least]) => {
    const given = limits[name as keyof GpuLimits]
    return given < least ? [`${name} ${given} where kernels need ${least}`] : []
  })
  if (short.length === 0) return
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op: 'webgpuBackend',
    problem: `the device has ${short.join(', ')}`,
    fix: 'ask the adapter for a device without featureLevel "compatibility"',
  })
}
