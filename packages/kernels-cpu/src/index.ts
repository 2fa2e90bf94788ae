/** @file Public interface of @moe/kernels-cpu. */
export { type CpuBackend, type CpuOptions, createBackend } from './backend.ts'
export { type Isa, isas } from './load.ts'
export type { MemoryStats } from './memory.ts'
export { type OpProfile, profile, startProfile, stopProfile } from './profile.ts'
