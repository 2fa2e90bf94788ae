/** @file Public interface of @moe/server. */
export type { ServerEnv } from './answer.ts'
export { createServer, type ServerOptions } from './create-server.ts'
export type { Served } from './generation-request.ts'
export type { RequestRecord } from './request-record.ts'
export { type ServeOptions, type Serving, serve } from './serve.ts'
export type { FinishReason, TextEngine } from './text-engine.ts'
