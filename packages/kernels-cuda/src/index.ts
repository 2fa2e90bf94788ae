/** @file Public interface of @moe/kernels-cuda. */
export { type CudaBackend, type CudaStats, createBackend } from './backend.ts'
export type { Device } from './driver/device.ts'

export type { CudaInterop, DeviceMemory, DeviceQueue } from './interop.ts'
export type { MemoryStats } from './memory.ts'
export type { CudaOptions } from './open.ts'
