/** @file What is used of WebGPU, so that declarations do without a library of its types. A `GPUDevice` of any implementation fits. */

/** Memory of a device: of a `GPUBuffer`. */
export interface GpuBuffer {
  /** Bytes. */
  readonly size: number
  /** Resolves when the host may read it. */
  mapAsync(mode: number): Promise<unknown>
  /** Its bytes, once it is mapped. */
  getMappedRange(): ArrayBuffer
  /** The host reads it no more. */
  unmap(): void
  /** Gives it back. */
  destroy(): void
}

/** Kernels in a row: of a `GPUComputePassEncoder`. */
export interface GpuPass {
  /** The kernel that is launched next. */
  setPipeline(pipeline: unknown): void
  /** The buffers of the next launch. */
  setBindGroup(index: number, group: unknown, offsets?: readonly number[]): void
  /** A launch, of so many workgroups along each axis. */
  dispatchWorkgroups(x: number, y?: number, z?: number): void
  /** No more launches. */
  end(): void
}

/** Work that is written down to be submitted: of a `GPUCommandEncoder`. */
export interface GpuEncoder {
  /** Begins a row of kernels. */
  beginComputePass(): GpuPass
  /** Copies bytes on the device. */
  copyBufferToBuffer(from: GpuBuffer, fromByte: number, to: GpuBuffer, toByte: number, bytes: number): void
  /** Writes zeros. */
  clearBuffer(buffer: GpuBuffer, offset: number, bytes: number): void
  /** What `submit` takes. */
  finish(): unknown
}

/** What is looked at of a device's limits: of a `GPUSupportedLimits`. */
export interface GpuLimits {
  /** Bytes. */
  readonly maxBufferSize: number
  /** Bytes that a kernel sees of a buffer. */
  readonly maxStorageBufferBindingSize: number
  /** Workgroups along an axis. */
  readonly maxComputeWorkgroupsPerDimension: number
  /** Buffers of a kernel. */
  readonly maxStorageBuffersPerShaderStage: number
  /** Threads of a workgroup. */
  readonly maxComputeInvocationsPerWorkgroup: number
  /** Threads of a workgroup along its first axis. */
  readonly maxComputeWorkgroupSizeX: number
  /** Bytes that the threads of a workgroup share. */
  readonly maxComputeWorkgroupStorageSize: number
}

/** What is used of a `GPUDevice`; each member is that of WebGPU. */
export interface GpuDevice {
  /** What it can do at most. */
  readonly limits: GpuLimits
  /** Settles when the device is gone. */
  readonly lost: Promise<{
    /** `destroyed` or `unknown`. */
    readonly reason: string
    /** For people. */
    readonly message: string
  }>
  /** Where work is handed in. */
  readonly queue: {
    /** Hands in what encoders have finished. */
    submit(commands: readonly unknown[]): void
    /** Copies from the host, before all that is submitted later. */
    writeBuffer(buffer: GpuBuffer, offset: number, data: ArrayBufferView): void
    /** Resolves when all that was submitted is done. */
    onSubmittedWorkDone(): Promise<unknown>
  }
  /** Tells of errors that no call throws. */
  addEventListener(
    type: 'uncapturederror',
    listener: (event: { readonly error: { readonly message: string } }) => void,
  ): void
  /** Memory of `size` bytes. */
  createBuffer(descriptor: { readonly size: number; readonly usage: number; readonly label?: string }): GpuBuffer
  /** Compiles WGSL. */
  createShaderModule(descriptor: { readonly code: string; readonly label?: string }): unknown
  /** Kinds of buffers that a kernel has. */
  createBindGroupLayout(descriptor: { readonly entries: readonly object[] }): unknown
  /** Joins layouts of bind groups. */
  createPipelineLayout(descriptor: { readonly bindGroupLayouts: readonly unknown[] }): unknown
  /** A kernel that can be launched. */
  createComputePipeline(descriptor: object): unknown
  /** Buffers that a kernel is launched with. */
  createBindGroup(descriptor: { readonly layout: unknown; readonly entries: readonly object[] }): unknown
  /** Begins to write work down. */
  createCommandEncoder(): GpuEncoder
  /** Gives everything back. */
  destroy(): void
}

/** What is used of a `GPUAdapter`. */
export interface GpuAdapter {
  readonly info: {
    readonly vendor: string
    readonly architecture: string
    readonly device: string
    readonly description: string
    /** Whether the processor does its work; not known everywhere. */
    readonly isFallbackAdapter?: boolean
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
