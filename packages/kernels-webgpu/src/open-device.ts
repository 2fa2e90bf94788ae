/** @file Finding a GPU: that of the browser (or Deno, or Bun), else the one that the npm package `webgpu` brings to Node. */
import { MoeError } from '@moe/core'
import type { Gpu, GpuAdapter, GpuDevice } from './gpu.ts'

/** A device, and how people call it. */
export interface OpenDevice {
  readonly device: GpuDevice
  readonly name: string
}

const refused = (problem: string, fix: string, cause?: unknown) =>
  new MoeError({ code: 'E_NO_BACKEND', op: 'kernels-webgpu', problem, fix, cause })

/**
 * @param software whether a GPU in software will do
 * @throws MoeError E_NO_BACKEND: no WebGPU here, or no GPU for it
 */
export async function openDevice(software: boolean): Promise<OpenDevice> {
  const gpu = await findGpu()
  const adapter = await gpu.requestAdapter({ powerPreference: 'high-performance' })
  if (adapter === null) {
    throw refused(
      'WebGPU finds no GPU',
      'it needs a driver for Vulkan, Metal or Direct3D 12; @moe/kernels-cpu computes without one',
    )
  }
  if (adapter.info.isFallbackAdapter && !software) {
    throw refused(
      `the only GPU is ${nameOf(adapter)}, computed by the processor, which others use better`,
      'take another backend, or this one by createBackend({ software: true })',
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
    throw refused(`the GPU gives no device: ${text}`, 'close other programs that use it, or update its driver', cause)
  }
}

function nameOf({ info }: GpuAdapter): string {
  // Deno has numbers for vendors.
  const vendor = /^\d*$/.test(info.vendor) ? '' : info.vendor
  const words = [vendor, info.architecture, info.description || info.device].filter(Boolean)
  return words.length > 0 ? words.join(' ') : 'a GPU'
}

async function findGpu(): Promise<Gpu> {
  const { navigator } = globalThis as { navigator?: { gpu?: Gpu } }
  if (navigator?.gpu) return navigator.gpu
  // A browser without WebGPU has nothing to install.
  if (typeof process === 'undefined') {
    throw refused('this browser has no WebGPU', 'use a current Chrome, Edge, Firefox or Safari over https or localhost')
  }
  return fromPackage()
}

/** Dawn has state of the whole process; one is enough for all backends. */
let dawn: Gpu | undefined

async function fromPackage(): Promise<Gpu> {
  if (dawn) return dawn
  // A name that is known when it runs is left alone by bundlers for browsers, and by these words without a warning.
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
      : `${name} does not load: ${text}`
    throw refused(problem, 'npm install webgpu', cause)
  }
}
