/** @file For tests only: a device that computes nothing, counts calls, checks limits, and fails on request. */
import type { GpuBuffer, GpuDevice, GpuEncoder, GpuPass } from './gpu.ts'

/** A substitute for WebGPU's error class of this name. */
export class GPUOutOfMemoryError extends Error {}

/** A launch: WGSL, descriptors, offset of the parameters, and numbers of workgroups. */
interface Launch {
  readonly code: string
  readonly layout: readonly object[]
  readonly group: readonly object[]
  readonly offsets: readonly number[]
  readonly groups: readonly (number | undefined)[]
}

export interface TestDevice {
  readonly device: GpuDevice
  /** Number of calls by name. */
  readonly calls: Readonly<Record<string, number>>
  /** The names of all calls, in order. */
  readonly log: readonly string[]
  /** What kernels are made from and launched with, in order. */
  readonly launches: readonly Launch[]
  /** What was written to buffers, in order. */
  readonly writes: ReadonlyArray<{ readonly buffer: GpuBuffer; readonly at: number; readonly bytes: Uint8Array }>
  report(error: Error): void
  lose(message: string): void
}

export function testDevice(limits: Partial<GpuDevice['limits']> = {}): TestDevice {
  const calls: Record<string, number> = {}
  const log: string[] = []
  const count = (name: string) => {
    log.push(name)
    calls[name] = (calls[name] ?? 0) + 1
  }
  let listener: Parameters<GpuDevice['addEventListener']>[1] = () => {}
  let lose: (lost: { reason: string; message: string }) => void = () => {}
  const launches: Launch[] = []
  const writes: { buffer: GpuBuffer; at: number; bytes: Uint8Array }[] = []
  let pipeline = { code: '', layout: [] as readonly object[] }
  let bound = { group: [] as readonly object[], offsets: [] as readonly number[] }
  const pass: GpuPass = {
    setPipeline(set) {
      pipeline = set as typeof pipeline
    },
    setBindGroup(_, group, offsets = []) {
      bound = { group: group as readonly object[], offsets }
    },
    dispatchWorkgroups(...groups) {
      count('dispatchWorkgroups')
      launches.push({ ...pipeline, ...bound, groups })
      if (Math.max(...groups.map(size => size ?? 1)) > device.limits.maxComputeWorkgroupsPerDimension)
        listener({ error: new Error(`${groups} workgroups`) })
    },
    end() {},
  }
  const encoder: GpuEncoder = {
    beginComputePass: () => pass,
    copyBufferToBuffer: () => count('copyBufferToBuffer'),
    clearBuffer() {},
    finish: () => ({}),
  }
  const createBuffer = ({ size }: { readonly size: number }): GpuBuffer => {
    count('createBuffer')
    if (size > device.limits.maxBufferSize) listener({ error: new Error(`a buffer of ${size} bytes`) })
    return {
      size,
      mapAsync: async () => {},
      getMappedRange: () => new ArrayBuffer(size),
      unmap() {},
      destroy: () => count('destroy buffer'),
    }
  }
  const device: GpuDevice = {
    limits: {
      maxBufferSize: 2 ** 28,
      maxStorageBufferBindingSize: 2 ** 27,
      maxComputeWorkgroupsPerDimension: 65_535,
      maxStorageBuffersPerShaderStage: 8,
      maxComputeInvocationsPerWorkgroup: 256,
      maxComputeWorkgroupSizeX: 256,
      maxComputeWorkgroupStorageSize: 16_384,
      ...limits,
    },
    lost: new Promise(resolve => {
      lose = resolve
    }),
    queue: {
      submit: () => count('submit'),
      writeBuffer(buffer, at, data) {
        count('writeBuffer')
        writes.push({ buffer, at, bytes: new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice() })
      },
      onSubmittedWorkDone: async () => {},
    },
    addEventListener(_, added) {
      listener = added
    },
    createBuffer,
    createShaderModule: ({ code }) => code,
    createBindGroupLayout: ({ entries }) => entries,
    createPipelineLayout: ({ bindGroupLayouts }) => bindGroupLayouts[0],
    createComputePipeline(descriptor) {
      count('createComputePipeline')
      const { layout, compute } = descriptor as { layout: unknown; compute: { module: unknown } }
      return { code: compute.module, layout }
    },
    createBindGroup({ entries }) {
      count('createBindGroup')
      for (const { resource } of entries as ReadonlyArray<{ resource: { buffer: GpuBuffer } }>) {
        const { size } = resource.buffer
        if (size > device.limits.maxStorageBufferBindingSize)
          listener({ error: new Error(`a binding of ${size} bytes`) })
      }
      return entries
    },
    createCommandEncoder: () => encoder,
    destroy: () => lose({ reason: 'destroyed', message: 'it was destroyed' }),
  }
  return {
    device,
    calls,
    log,
    launches,
    writes,
    report: error => listener({ error }),
    lose: message => lose({ reason: 'unknown', message }),
  }
}
