/** @file For tests only: a device that computes nothing, counts calls, and fails on request. */
import type { GpuBuffer, GpuDevice, GpuEncoder, GpuPass } from './gpu.ts'

/** A substitute for WebGPU's error class of this name. */
export class GPUOutOfMemoryError extends Error {}

export interface TestDevice {
  readonly device: GpuDevice
  /** Number of calls by name. */
  readonly calls: Readonly<Record<string, number>>
  report(error: Error): void
  lose(message: string): void
}

export function testDevice(limits: Partial<GpuDevice['limits']> = {}): TestDevice {
  const calls: Record<string, number> = {}
  const count = (name: string) => {
    calls[name] = (calls[name] ?? 0) + 1
  }
  let listener: Parameters<GpuDevice['addEventListener']>[1] = () => {}
  let lose: (lost: { reason: string; message: string }) => void = () => {}
  const pass: GpuPass = {
    setPipeline() {},
    setBindGroup() {},
    dispatchWorkgroups: () => count('dispatchWorkgroups'),
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
      writeBuffer: () => count('writeBuffer'),
      onSubmittedWorkDone: async () => {},
    },
    addEventListener(_, added) {
      listener = added
    },
    createBuffer,
    createShaderModule: () => ({}),
    createBindGroupLayout: () => ({}),
    createPipelineLayout: () => ({}),
    createComputePipeline() {
      count('createComputePipeline')
      return {}
    },
    createBindGroup() {
      count('createBindGroup')
      return {}
    },
    createCommandEncoder: () => encoder,
    destroy: () => lose({ reason: 'destroyed', message: 'it was destroyed' }),
  }
  return {
    device,
    calls,
    report: error => listener({ error }),
    lose: message => lose({ reason: 'unknown', message }),
  }
}
