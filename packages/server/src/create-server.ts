/** @file The server as a Hono application: routes and middleware. */
import { createHash, timingSafeEqual } from 'node:crypto'
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import { Hono } from 'hono'
import { cors } from 'hono/cors'
import { methodNotAllowed } from 'hono/method-not-allowed'
import type { ContentfulStatusCode } from 'hono/utils/http-status'
import { answer, type ServerEnv } from './answer.ts'
import { chatCompletions } from './chat-completions.ts'
import { completions } from './completions.ts'
import type { Endpoint } from './endpoint.ts'
import { ApiError, toApiError } from './errors.ts'
import { type ServedModel, unknownModel } from './generation-request.ts'
import { Grammars } from './grammars.ts'
import { METRICS_TYPE, Metrics } from './metrics.ts'
import type { RequestRecord } from './request-record.ts'
import { responses } from './responses.ts'
import { controlTokensOf, traitsOf } from './template-traits.ts'
import type { TextEngine } from './text-engine.ts'

/** Options of {@link createServer}. */
export interface ServerOptions extends ServedModel {
  /** Generates the texts. The caller disposes of it after the server has stopped. */
  readonly engine: TextEngine
  /** The key that clients must send as `Authorization: Bearer KEY`. Default: no key is required. */
  readonly apiKey?: string | undefined
  /** Origins that may call the server from a web page, or `*` for any. Default: the server's own origin only. */
  readonly cors?: string | readonly string[] | undefined
  /** Maximum size of a request body in bytes. Default: 4 MiB. */
  readonly bodyLimit?: number | undefined
  /** Called with a record of each request when it has finished. If it throws, the process emits a warning, and the request is not affected. */
  readonly onRequest?: ((record: RequestRecord) => void) | undefined
}

const optionNames: OptionNames<ServerOptions> = {
  model: true,
  tokenizer: true,
  chatTemplate: true,
  name: true,
  engine: true,
  apiKey: true,
  cors: true,
  bodyLimit: true,
  onRequest: true,
}

/**
 * Creates an OpenAI-compatible server for one model. Pass the application to {@link serve} to listen on a port, or call `app.fetch(request)` or
 * `app.request(path)` directly.
 * @returns a Hono application
 * @throws MoeError `E_CONFIG` if an option is missing, unknown or invalid
 */
export function createServer(options: ServerOptions): Hono<ServerEnv> {
  checkOptions('createServer', options, optionNames)
  const { engine, name, apiKey, bodyLimit: maxSize = 4 * 2 ** 20, onRequest } = options
  for (const required of ['model', 'tokenizer', 'name', 'engine'] as const) {
    if (options[required]) continue
    throw new MoeError({ code: 'E_CONFIG', op: 'createServer', problem: `${required} is missing` })
  }
  if (apiKey === '') {
    const fix = 'pass a key, or omit apiKey to accept requests without one'
    throw new MoeError({ code: 'E_CONFIG', op: 'createServer', problem: 'apiKey is empty', fix })
  }
  if (!(maxSize > 0)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'createServer',
      problem: `expected a positive bodyLimit, got ${maxSize}`,
    })
  }
  const metrics = new Metrics(engine)
  const { max_position_embeddings: context, eos_token_id: end } = options.model.config
  const traits = traitsOf(options.chatTemplate)
  const grammars = new Grammars(options.tokenizer, [end ?? []].flat(), controlTokensOf(traits))
  const served = { ...options, grammars, traits }
  const listed = {
    id: name,
    object: 'model',
    created: Math.floor(Date.now() / 1000),
    owned_by: 'moe',
    max_model_len: context,
  }

  const app = new Hono<ServerEnv>()
  app.use(async (c, next) => {
    const started = performance.now()
    const record: RequestRecord = { method: c.req.method, path: c.req.path, status: 0, seconds: 0 }
    c.set('record', record)
    await next()
    record.status ||= c.res.status
    const finish = () => {
      record.seconds = (performance.now() - started) / 1000
      metrics.add(record)
      try {
        onRequest?.(record)
      } catch (error) {
        process.emitWarning(`onRequest failed: ${error instanceof Error ? error.stack : error}`)
      }
    }
    const streamed = c.get('streamed')
    if (streamed) void streamed.then(finish, finish)
    else finish()
  })
  app.onError((error, c) => {
    const apiError = toApiError(error)
    c.get('record').error = error
    return c.json(apiError.toJSON(), apiError.status as ContentfulStatusCode)
  })
  app.notFound(c => refuse(404, `unknown path ${c.req.path.slice(0, 100)}: the API is at /v1`, 'unknown_url'))
  if (options.cors !== undefined) {
    const origins = [options.cors].flat()
    app.use(cors({ origin: origins.includes('*') ? '*' : origins }))
  }
  app.use(
    methodNotAllowed({
      app,
      onMethodNotAllowed: (c, methods) => {
        const allow = methods.join(', ')
        return refuse(405, `${c.req.path} supports only ${allow}`, 'method_not_supported', { Allow: allow })
      },
    }),
  )
  app.get('/health', c => c.json({ status: 'ok' }))
  if (apiKey !== undefined) {
    const key = digest(apiKey)
    app.use(async (c, next) => {
      const [, given] = /^bearer +(.*)$/i.exec(c.req.header('authorization') ?? '') ?? []
      if (given !== undefined && timingSafeEqual(digest(given), key)) return next()
      const problem = given === undefined ? 'missing API key' : 'invalid API key'
      throw new ApiError(401, `${problem}: send the header Authorization: Bearer KEY`, { code: 'invalid_api_key' })
    })
  }
  app.get('/metrics', c => c.text(metrics.toString(), 200, { 'content-type': METRICS_TYPE }))
  app.get('/v1/models', c => c.json({ object: 'list', data: [listed] }))
  app.get('/v1/models/:id{.+}', c => {
    const id = c.req.param('id')
    if (id !== name) throw unknownModel(id, name)
    return c.json(listed)
  })
  const post = (path: string, endpoint: Endpoint) =>
    app.post(path, async c => {
      const request = await endpoint.parse(await readJson(c.req.raw, maxSize), served, c.req.raw.signal)
      return answer(c, endpoint, request, options, engine)
    })
  post('/v1/completions', completions)
  post('/v1/chat/completions', chatCompletions)
  post('/v1/responses', responses)
  return app
}

const digest = (text: string): Buffer => createHash('sha256').update(text).digest()

function refuse(status: number, message: string, code: string, headers?: Record<string, string>): Response {
  return Response.json(new ApiError(status, message, { code }).toJSON(), { status, headers })
}

/** @throws ApiError 400, 413, 415 */
async function readJson(request: Request, maxSize: number): Promise<unknown> {
  // Browsers let a page of any origin send text without a CORS preflight request, but not JSON.
  if (!/^application\/(json|[\w.+-]+\+json)\s*(;|$)/i.test(request.headers.get('content-type') ?? '')) {
    throw new ApiError(415, 'the Content-Type of the body is not JSON: send the header Content-Type: application/json')
  }
  const bytes = await readBytes(request, maxSize)
  let text: string
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(bytes)
  } catch (cause) {
    throw new ApiError(400, 'the body is not valid UTF-8', { cause })
  }
  if (isNestedTooDeeply(text)) {
    throw new ApiError(400, `the body is nested deeper than ${MAX_NESTING} levels`)
  }
  try {
    return JSON.parse(text)
  } catch (cause) {
    throw new ApiError(400, `the body is not valid JSON: ${(cause as Error).message}`, { cause })
  }
}

/** Writing JSON that is nested a few thousand levels deep exhausts the call stack. */
const MAX_NESTING = 500

function isNestedTooDeeply(json: string): boolean {
  let depth = 0
  let isInString = false
  for (let i = 0; i < json.length; i++) {
    const character = json[i]
    if (isInString) {
      if (character === '\\') i++
      else if (character === '"') isInString = false
    } else if (character === '"') isInString = true
    else if (character === '[' || character === '{') depth++
    else if (character === ']' || character === '}') depth--
    if (depth > MAX_NESTING) return true
  }
  return false
}

/**
 * Reads the body, with or without a Content-Length. Access `request.body` only here: as long as it is untouched, Node's server discards an unread body and keeps the
 * connection open.
 * @throws ApiError 400, 413
 */
async function readBytes(request: Request, maxSize: number): Promise<Uint8Array> {
  const check = (size: number) => {
    if (size <= maxSize) return
    const message = `the request body is larger than the limit of ${maxSize} bytes: send less`
    throw new ApiError(413, message, { code: 'request_too_large' })
  }
  check(Number(request.headers.get('content-length') ?? 0))
  const parts: Uint8Array[] = []
  let size = 0
  // Not `for await`: leaving that loop early closes the connection before the client receives the response.
  const reader = request.body?.getReader()
  for (;;) {
    const part = await reader?.read().catch(cause => {
      throw new ApiError(400, 'the request body is incomplete', { cause })
    })
    if (part?.value === undefined) return Buffer.concat(parts)
    parts.push(part.value)
    size += part.value.length
    check(size)
  }
}
