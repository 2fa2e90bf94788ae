/** @file Public interface of @moe/kernels-webgpu. */
export { type CreateWebGpuOptions, createBackend, type WebGpuOptions, webgpuBackend } from './backend.ts'
export type { GpuBuffer, GpuDevice, GpuEncoder, GpuLimits, GpuPass } from './gpu.ts'
