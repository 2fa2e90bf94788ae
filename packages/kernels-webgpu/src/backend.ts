/** @file `webgpuBackend`: core's Backend on a device of WebGPU. */
import { type Backend, checkOptions, type DType, MoeError } from '@moe/core'
import { Commands } from './commands.ts'
import { bufferOf, DeviceOps } from './device-ops.ts'
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
 * A backend on a device that is there already, such as one that a page draws with; `dispose` destroys the device. dtypes: f32, i32 and u8, four bytes an element
 * on the device.
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
    dtypes: new Set<DType>(['f32', 'i32', 'u8']),
    bf16Matmul: false,
    fp8Matmul: false,
    primitives: primitivesOn(gpu),
    fused: fusedOn(gpu),
    upload(data, shape, dtype) {
      const y = gpu.output('upload', { shape, dtype })
      // A copy in whole words, so that the device may take it when it likes.
      commands.upload(dtype === 'f32' ? (data as Float32Array) : Int32Array.from(data as ArrayLike<number>), y.gpu)
      return y
    },
    async download(value) {
      const { gpu: from, bytes } = bufferOf(value)
      const read = await commands.download(from, bytes)
      if (value.dtype === 'f32') return new Float32Array(read)
      const integers = new Int32Array(read)
      return value.dtype === 'u8' ? Uint8Array.from(integers) : integers
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
