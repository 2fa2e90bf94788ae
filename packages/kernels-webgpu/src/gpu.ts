/** @file The part of WebGPU that is used, so that the type declarations need no library. A `GPUDevice` of any implementation is assignable. */

/** The part of `GPUBuffer` that is used. */
export interface GpuBuffer {
  /** Size in bytes. */
  readonly size: number
  /** Resolves when the host can read it. */
  mapAsync(mode: number): Promise<unknown>
  /** Its bytes, when it is mapped. */
  getMappedRange(): ArrayBuffer
  /** Ends the host's access. */
  unmap(): void
  /** Frees the memory. */
  destroy(): void
}

/** The part of `GPUComputePassEncoder` that is used. */
export interface GpuPass {
  /** Sets the kernel for the next launches. */
  setPipeline(pipeline: unknown): void
  /** Sets the buffers for the next launches. */
  setBindGroup(index: number, group: unknown, offsets?: readonly number[]): void
  /** Launches the kernel with this many workgroups along each axis. */
  dispatchWorkgroups(x: number, y?: number, z?: number): void
  /** Ends the pass. */
  end(): void
}

/** The part of `GPUCommandEncoder` that is used. */
export interface GpuEncoder {
  /** Starts a pass of kernels. */
  beginComputePass(): GpuPass
  /** Copies bytes on the device. */
  copyBufferToBuffer(from: GpuBuffer, fromByte: number, to: GpuBuffer, toByte: number, bytes: number): void
  /** Fills bytes with zeros. */
  clearBuffer(buffer: GpuBuffer, offset: number, bytes: number): void
  /** Returns the command buffer for `submit`. */
  finish(): unknown
}

/** The limits that are used, of `GPUSupportedLimits`. */
export interface GpuLimits {
  /** Maximum size of a buffer in bytes. */
  readonly maxBufferSize: number
  /** Maximum number of bytes of a buffer that a kernel can access. */
  readonly maxStorageBufferBindingSize: number
  /** Maximum number of workgroups along an axis. */
  readonly maxComputeWorkgroupsPerDimension: number
  /** Maximum number of buffers of a kernel. */
  readonly maxStorageBuffersPerShaderStage: number
  /** Maximum number of threads of a workgroup. */
  readonly maxComputeInvocationsPerWorkgroup: number
  /** Maximum number of threads of a workgroup along its first axis. */
  readonly maxComputeWorkgroupSizeX: number
  /** Maximum number of bytes that the threads of a workgroup share. */
  readonly maxComputeWorkgroupStorageSize: number
}

/** The part of `GPUDevice` that is used. */
export interface GpuDevice {
  /** The limits of the device. */
  readonly limits: GpuLimits
  /** Resolves when the device is lost. */
  readonly lost: Promise<{
    /** `destroyed` or `unknown`. */
    readonly reason: string
    /** A description for people. */
    readonly message: string
  }>
  /** The queue to which work is submitted. */
  readonly queue: {
    /** Submits command buffers. */
    submit(commands: readonly unknown[]): void
    /** Copies host memory to a buffer, before all work that is submitted later. */
    writeBuffer(buffer: GpuBuffer, offset: number, data: ArrayBufferView): void
    /** Resolves when all submitted work is done. */
    onSubmittedWorkDone(): Promise<unknown>
  }
  /** Reports errors that no call throws. */
  addEventListener(
    type: 'uncapturederror',
    listener: (event: { readonly error: { readonly message: string } }) => void,
  ): void
  /** Creates a buffer of `size` bytes. */
  createBuffer(descriptor: { readonly size: number; readonly usage: number; readonly label?: string }): GpuBuffer
  /** Compiles WGSL. */
  createShaderModule(descriptor: { readonly code: string; readonly label?: string }): unknown
  /** Describes the kinds of buffers of a kernel. */
  createBindGroupLayout(descriptor: { readonly entries: readonly object[] }): unknown
  /** Combines bind group layouts. */
  createPipelineLayout(descriptor: { readonly bindGroupLayouts: readonly unknown[] }): unknown
  /** Creates a kernel that can be launched. */
  createComputePipeline(descriptor: object): unknown
  /** Creates the set of buffers for a launch. */
  createBindGroup(descriptor: { readonly layout: unknown; readonly entries: readonly object[] }): unknown
  /** Starts recording work. */
  createCommandEncoder(): GpuEncoder
  /** Frees the device and everything on it. */
  destroy(): void
}

/** The part of `GPUAdapter` that is used. */
export interface GpuAdapter {
  readonly info: {
    readonly vendor: string
    readonly architecture: string
    readonly device: string
    readonly description: string
    /** Whether it is emulated by the processor; not reported everywhere. */
    readonly isFallbackAdapter?: boolean
  }
  readonly limits: GpuLimits
  requestDevice(descriptor: { readonly requiredLimits: Record<string, number> }): Promise<GpuDevice>
}

/** The part of `navigator.gpu` that is used. */
export interface Gpu {
  requestAdapter(options?: { readonly powerPreference?: 'high-performance' | 'low-power' }): Promise<GpuAdapter | null>
}

/** Values of `GPUBufferUsage`, which Node does not define. */
export const usage = { mapRead: 1, copyFrom: 4, copyTo: 8, uniform: 64, storage: 128 } as const
/** `GPUMapMode.READ`. */
export const mapRead = 1
