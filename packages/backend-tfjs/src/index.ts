/** @file Public interface of @moe/backend-tfjs. */
export { type CreateBackendOptions, createBackend } from './create-backend.ts'
export type { TfNamespace, TfTensor } from './namespace.ts'
export { createNodeBackend, type NodeBackendOptions } from './node-backend.ts'
export { type TfjsBackendOptions, tfjsBackend } from './tfjs-backend.ts'
