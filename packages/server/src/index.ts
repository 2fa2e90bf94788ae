/** @file Public interface of @moe/server. */
export type { ServerEnv } from './answer.ts'
export { createServer, type ServerOptions } from './create-server.ts'
export type { ServedModel } from './generation-request.ts'
export type { RequestRecord } from './request-record.ts'
export { type RunningServer, type ServeOptions, serve } from './serve.ts'
export type { FinishReason, TextEngine } from './text-engine.ts'
