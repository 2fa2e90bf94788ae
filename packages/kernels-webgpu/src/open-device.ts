/** @file Finds a GPU: that of the browser, Deno or Bun, or else the one that the npm package `webgpu` provides in Node. */
import { MoeError } from '@moe/core'
import type { Gpu, GpuAdapter, GpuDevice } from './gpu.ts'

/** A device, and its name for display. */
export interface OpenDevice {
  readonly device: GpuDevice
  readonly name: string
}

const refused = (problem: string, fix: string, cause?: unknown) =>
  new MoeError({ code: 'E_NO_BACKEND', op: 'kernels-webgpu', problem, fix, cause })

/**
 * @param software whether to accept a software GPU
 * @throws MoeError E_NO_BACKEND if there is no WebGPU or no GPU for it
 */
export async function openDevice(software: boolean): Promise<OpenDevice> {
  const gpu = await findGpu()
  const adapter = await gpu.requestAdapter({ powerPreference: 'high-performance' })
  if (adapter === null) {
    throw refused('WebGPU found no GPU', 'install a driver for Vulkan, Metal or Direct3D 12, or use @moe/kernels-cpu')
  }
  if (adapter.info.isFallbackAdapter && !software) {
    throw refused(
      `the only GPU is ${nameOf(adapter)}, which the processor emulates; other backends are faster`,
      'use another backend, or pass createBackend({ software: true }) to use it anyway',
    )
  }
  return { device: await deviceOf(adapter), name: nameOf(adapter) }
}

async function deviceOf(adapter: GpuAdapter): Promise<GpuDevice> {
  const { maxBufferSize, maxStorageBufferBindingSize } = adapter.limits
  try {
    return await adapter.requestDevice({ requiredLimits: { maxBufferSize, maxStorageBufferBindingSize } })
  } catch (cause) {
    const text = cause instanceof Error ? cause.message : String(cause)
    throw refused(
      `the GPU could not be opened: ${text}`,
      'close other programs that use it, or update its driver',
      cause,
    )
  }
}

function nameOf({ info }: GpuAdapter): string {
  // Deno reports vendors as numbers.
  const vendor = /^\d*$/.test(info.vendor) ? '' : info.vendor
  const words = [vendor, info.architecture, info.description || info.device].filter(Boolean)
  return words.length > 0 ? words.join(' ') : 'a GPU'
}

async function findGpu(): Promise<Gpu> {
  const { navigator } = globalThis as { navigator?: { gpu?: Gpu } }
  if (navigator?.gpu) return navigator.gpu
  // In a browser without WebGPU there is nothing to install.
  if (typeof process === 'undefined') {
    throw refused('this browser has no WebGPU', 'use a current Chrome, Edge, Firefox or Safari over https or localhost')
  }
  return fromPackage()
}

/** Dawn keeps process-wide state; all backends share one instance. */
let dawn: Gpu | undefined

async function fromPackage(): Promise<Gpu> {
  if (dawn) return dawn
  // A name computed at run time is ignored by bundlers for browsers; the comments in the import suppress their warnings.
  const name = process.env.MOE_WEBGPU || 'webgpu'
  try {
    const { create } = (await import(/* @vite-ignore */ /* webpackIgnore: true */ name)) as {
      create(options: readonly string[]): Gpu
    }
    dawn = create([])
    return dawn
  } catch (cause) {
    const { code } = cause as { code?: string }
    const text = cause instanceof Error ? cause.message : String(cause)
    const missing = code === 'ERR_MODULE_NOT_FOUND' || code === 'MODULE_NOT_FOUND'
    const problem = missing
      ? `Node has no WebGPU of its own, and ${name} is not installed`
      : `${name} failed to load: ${text}`
    throw refused(problem, 'run npm install webgpu', cause)
  }
}
