/** @file What is used of WebGPU, so that declarations do without a library of its types. A `GPUDevice` of any implementation fits. */

/** Memory of a device. */
export interface GpuBuffer {
  readonly size: number
  mapAsync(mode: number): Promise<unknown>
  getMappedRange(): ArrayBuffer
  unmap(): void
  destroy(): void
}

/** Kernels in a row. */
export interface GpuPass {
  setPipeline(pipeline: unknown): void
  setBindGroup(index: number, group: unknown, offsets?: readonly number[]): void
  dispatchWorkgroups(x: number, y?: number, z?: number): void
  end(): void
}

/** Work that is written down to be submitted. */
export interface GpuEncoder {
  beginComputePass(): GpuPass
  copyBufferToBuffer(from: GpuBuffer, fromByte: number, to: GpuBuffer, toByte: number, bytes: number): void
  clearBuffer(buffer: GpuBuffer, offset: number, bytes: number): void
  finish(): unknown
}

/** What is looked at of a device's limits. */
export interface GpuLimits {
  readonly maxBufferSize: number
  readonly maxStorageBufferBindingSize: number
  readonly maxComputeWorkgroupsPerDimension: number
  readonly maxStorageBuffersPerShaderStage: number
  readonly maxComputeInvocationsPerWorkgroup: number
  readonly maxComputeWorkgroupSizeX: number
  readonly maxComputeWorkgroupStorageSize: number
}

/** What is used of a `GPUDevice`. */
export interface GpuDevice {
  readonly limits: GpuLimits
  readonly lost: Promise<{ readonly reason: string; readonly message: string }>
  readonly queue: {
    submit(commands: readonly unknown[]): void
    writeBuffer(buffer: GpuBuffer, offset: number, data: ArrayBufferView): void
    onSubmittedWorkDone(): Promise<unknown>
  }
  addEventListener(
    type: 'uncapturederror',
    listener: (event: { readonly error: { readonly message: string } }) => void,
  ): void
  createBuffer(descriptor: { readonly size: number; readonly usage: number; readonly label?: string }): GpuBuffer
  createShaderModule(descriptor: { readonly code: string; readonly label?: string }): unknown
  createBindGroupLayout(descriptor: { readonly entries: readonly object[] }): unknown
  createPipelineLayout(descriptor: { readonly bindGroupLayouts: readonly unknown[] }): unknown
  createComputePipeline(descriptor: object): unknown
  createBindGroup(descriptor: { readonly layout: unknown; readonly entries: readonly object[] }): unknown
  createCommandEncoder(): GpuEncoder
  destroy(): void
}

/** What is used of a `GPUAdapter`. */
export interface GpuAdapter {
  readonly info: {
    readonly vendor: string
    readonly architecture: string
    readonly device: string
    readonly description: string
  }
  readonly limits: GpuLimits
  requestDevice(descriptor: { readonly requiredLimits: Record<string, number> }): Promise<GpuDevice>
}

/** What is used of `navigator.gpu`. */
export interface Gpu {
  requestAdapter(options?: { readonly powerPreference?: 'high-performance' | 'low-power' }): Promise<GpuAdapter | null>
}

/** Numbers of `GPUBufferUsage`, which Node has not. */
export const usage = { mapRead: 1, copyFrom: 4, copyTo: 8, uniform: 64, storage: 128 } as const
/** `GPUMapMode.READ`. */
export const mapRead = 1
