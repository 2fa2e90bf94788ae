/** @file The server as a Hono application: routes, and what every request goes through. */
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
import { Grammars } from './grammars.ts'
import { METRICS_TYPE, Metrics } from './metrics.ts'
import type { RequestRecord } from './request-record.ts'
import { responses } from './responses.ts'
import { marksOf, traitsOf } from './template-traits.ts'
import type { TextEngine } from './text-engine.ts'
import { type Served, unknownModel } from './wanted-texts.ts'

/** What is served, by what, and to whom. */
export interface ServerOptions extends Served {
  /** Makes the texts. It is its owner's to dispose, when nothing is served any more. */
  readonly engine: TextEngine
  /** What clients send as `Authorization: Bearer KEY`. Default: nobody is asked. */
  readonly apiKey?: string
  /** Origins whose pages may call, or `*`. Default: none but the server's own. */
  readonly cors?: string | readonly string[]
  /** Most bytes of a request. Default 4 MiB. */
  readonly bodyLimit?: number
  /** Is given each request once it is over. */
  readonly onRequest?: (record: RequestRecord) => void
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
 * An OpenAI-compatible server of one model. `app.fetch` takes a request and gives a response; `serve` has it listen to a port, `app.request` asks it without one.
 * @throws MoeError E_CONFIG for what cannot be
 */
export function createServer(options: ServerOptions): Hono<ServerEnv> {
  checkOptions('createServer', options, optionNames)
  const { engine, name, apiKey, bodyLimit: maxSize = 4 * 2 ** 20, onRequest } = options
  for (const needed of ['model', 'tokenizer', 'name', 'engine'] as const) {
    if (options[needed]) continue
    throw new MoeError({ code: 'E_CONFIG', op: 'createServer', problem: `${needed} is missing` })
  }
  if (apiKey === '') {
    const fix = 'pass one, or leave it out and nobody is asked'
    throw new MoeError({ code: 'E_CONFIG', op: 'createServer', problem: 'apiKey is empty', fix })
  }
  if (!(maxSize > 0)) {
    throw new MoeError({ code: 'E_CONFIG', op: 'createServer', problem: `bodyLimit = ${maxSize} is not above 0` })
  }
  const metrics = new Metrics(engine)
  const { max_position_embeddings: context, eos_token_id: end } = options.model.config
  const traits = traitsOf(options.chatTemplate)
  const grammars = new Grammars(options.tokenizer, [end ?? []].flat(), marksOf(traits))
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
    const over = () => {
      record.seconds = (performance.now() - started) / 1000
      metrics.add(record)
      onRequest?.(record)
    }
    const streamed = c.get('streamed')
    if (streamed) void streamed.then(over)
    else over()
  })
  app.onError((error, c) => {
    const told = toApiError(error)
    c.get('record').error = error
    return c.json(told.toJSON(), told.status as ContentfulStatusCode)
  })
  app.notFound(c => refuse(404, `there is no ${c.req.path.slice(0, 100)}: the API is below /v1`, 'unknown_url'))
  if (options.cors !== undefined) {
    const origins = [options.cors].flat()
    app.use(cors({ origin: origins.includes('*') ? '*' : origins }))
  }
  app.use(
    methodNotAllowed({
      app,
      onMethodNotAllowed: (c, methods) => {
        const allow = methods.join(', ')
        return refuse(405, `${c.req.path} takes ${allow}`, 'method_not_supported', { Allow: allow })
      },
    }),
  )
  app.get('/health', c => c.json({ status: 'ok' }))
  if (apiKey !== undefined) {
    const key = digest(apiKey)
    app.use(async (c, next) => {
      const [, given] = /^bearer +(.*)$/i.exec(c.req.header('authorization') ?? '') ?? []
      if (given !== undefined && timingSafeEqual(digest(given), key)) return next()
      const problem = given === undefined ? 'there is no API key' : 'the API key is wrong'
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
      const wanted = await endpoint.wanted(await readJson(c.req.raw, maxSize), served, c.req.raw.signal)
      return answer(c, endpoint, wanted, options, engine)
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
  // Web pages may send text to any server without asking it first, JSON they may not.
  if (!/^application\/(json|[\w.+-]+\+json)\s*(;|$)/i.test(request.headers.get('content-type') ?? '')) {
    throw new ApiError(415, 'the body is not declared as JSON: send the header Content-Type: application/json')
  }
  const bytes = await readBytes(request, maxSize)
  let text: string
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(bytes)
  } catch (cause) {
    throw new ApiError(400, 'the body is no UTF-8', { cause })
  }
  try {
    return JSON.parse(text)
  } catch (cause) {
    throw new ApiError(400, `the body is no JSON: ${(cause as Error).message}`, { cause })
  }
}

/**
 * The body, whose length need not be declared. It is looked at only once it is to be read: Node's server reads past what nobody looks at, and keeps the connection.
 * @throws ApiError 400, 413
 */
async function readBytes(request: Request, maxSize: number): Promise<Uint8Array> {
  const check = (size: number) => {
    if (size <= maxSize) return
    const message = `the request has more than ${maxSize} bytes: send less`
    throw new ApiError(413, message, { code: 'request_too_large' })
  }
  check(Number(request.headers.get('content-length') ?? 0))
  const parts: Uint8Array[] = []
  let size = 0
  // Not `for await`: leaving that loop ends the connection before the client has its answer.
  const reader = request.body?.getReader()
  for (;;) {
    const part = await reader?.read().catch(cause => {
      throw new ApiError(400, 'the body did not arrive as a whole', { cause })
    })
    if (part?.value === undefined) return Buffer.concat(parts)
    parts.push(part.value)
    size += part.value.length
    check(size)
  }
}
