import { connect } from 'node:net'
import { MoeError, Random } from '@moe/core'
import type { Completion } from 'openai/resources'
import { describe, expect, test } from 'vitest'
import { serve } from './index.ts'
import { events, modelServer, post, scriptedServer, tokenizer } from './test-server.ts'

type App = Pick<ReturnType<typeof modelServer>['app'], 'request'>

const paths = ['/v1/completions', '/v1/chat/completions'] as const
type Path = (typeof paths)[number]

const validBodies = {
  '/v1/completions': { model: 'tiny', prompt: 'the people', max_tokens: 2, seed: 1 },
  '/v1/chat/completions': { model: 'tiny', messages: [{ role: 'user', content: 'the' }], max_tokens: 2, seed: 1 },
}

const shown = (body: unknown) => (typeof body === 'string' ? body : String(JSON.stringify(body))).slice(0, 200)

interface ReceivedError {
  readonly message: string
  readonly type: string
  readonly param: string | null
  readonly code: string | null
}

/** Returns the error of a response, after checking its format. */
async function errorOf(response: Response, about: string): Promise<ReceivedError> {
  const text = await response.text()
  expect(response.headers.get('content-type'), about).toMatch(/^application\/json/)
  const { error, ...more } = JSON.parse(text)
  expect(more, about).toEqual({})
  expect(Object.keys(error).sort(), about).toEqual(['code', 'message', 'param', 'type'])
  expect(error.message, about).toMatch(/\S/)
  expect(error.type, about).toBe('invalid_request_error')
  for (const value of [error.param, error.code]) if (value !== null) expect(value, about).toMatch(/\S/)
  return error
}

/** Posts an invalid request and returns its error. The response must be a 4xx with a short message. */
async function rejection(
  app: App,
  path: Path,
  body: unknown,
  init?: RequestInit,
): Promise<ReceivedError & { status: number }> {
  const about = `${path} ${shown(body)}`
  const response = await app.request(path, post(body, init))
  expect(`${response.status}`, about).toMatch(/^4\d\d$/)
  const error = await errorOf(response, about)
  expect(error.message.length, about).toBeLessThan(1000)
  return { status: response.status, ...error }
}

async function stillServes(app: App) {
  for (const path of paths) {
    const response = await app.request(path, post(validBodies[path]))
    expect(response.status).toBe(200)
    const { choices, usage } = (await response.json()) as Completion
    expect(choices).toHaveLength(1)
    expect(usage?.completion_tokens).toBeGreaterThan(0)
  }
}

function nested(depth: number, open: string, close: string, inside = '1'): string {
  return open.repeat(depth) + inside + close.repeat(depth)
}

/** JSON text that JSON.stringify cannot produce. */
class Raw {
  readonly json: string
  constructor(json: string) {
    this.json = json
  }
}

function withFields(path: Path, fields: Readonly<Record<string, unknown>>): string {
  const all = Object.entries({ ...validBodies[path], ...fields })
  const written = all.map(([name, value]) => [name, value instanceof Raw ? value.json : JSON.stringify(value)])
  return `{${written.map(([name, json]) => `${JSON.stringify(name)}:${json}`).join(',')}}`
}

const many = (n: number, item: unknown) => new Array(n).fill(item)

/** Values of the wrong type or out of range for every field. */
const wrongEverywhere: readonly unknown[] = [
  {},
  [[]],
  [null],
  [[[1]]],
  [{}],
  { __proto__: null, length: 1 },
  new Raw('{"__proto__":{"polluted":true}}'),
  new Raw('{"constructor":{"prototype":{"polluted":true}}}'),
  new Raw(nested(400, '[', ']')),
  new Raw(nested(400, '{"a":', '}')),
  many(100_000, null),
  many(100_000, []),
]

const wrongNumbers: readonly unknown[] = [
  'NaN',
  '1',
  '',
  true,
  false,
  [],
  [1],
  new Raw('1e999'),
  new Raw('-1e999'),
  new Raw('-1e308'),
]

const wrongFields: Readonly<Record<string, readonly unknown[]>> = {
  model: [0, 1, true, [], ['tiny']],
  stream: [0, 1, 'true', [], [true]],
  stream_options: [0, 1, true, 'usage', [], { include_usage: 1 }, { include_usage: 'yes' }],
  n: [...wrongNumbers, 0, -1, 1.5, 65, 1e9, 2 ** 53, 1e308],
  max_tokens: [...wrongNumbers, -1, 0.5, 2 ** 53, 1e308],
  temperature: [...wrongNumbers, -1e-9, 2.0001, 1e308],
  top_p: [...wrongNumbers, -0.1, 1.1, 1e308],
  top_k: [...wrongNumbers, -2, 0.5, 2 ** 53, 1e308],
  min_p: [...wrongNumbers, -0.1, 1.1, 1e308],
  repetition_penalty: [...wrongNumbers, 0, -1],
  frequency_penalty: [...wrongNumbers, -2.1, 2.1, 1e308],
  presence_penalty: [...wrongNumbers, -2.1, 2.1, 1e308],
  seed: [...wrongNumbers.slice(0, -1), 0.5, 'seed'],
  stop: [0, 1, true, '', [''], ['a', ''], [1], [['a']], many(17, 'a'), many(100_000, 'a')],
}

const wrongPrompts: readonly unknown[] = [
  0,
  1,
  true,
  [],
  [1.5],
  [-1],
  [1, 'the'],
  ['the', 1],
  ['the', [1]],
  [[1], 'the'],
  [[1], 1],
  [true],
  [1e308],
  [[]],
  [[], [1]],
  [290],
  [4294967296],
  [[1], [1, 290]],
  many(100_000, 1),
  many(100_000, 'the'),
  many(100_000, [1]),
  [many(100_000, 1)],
  'the people '.repeat(50_000),
]

const wrongMessages: readonly unknown[] = [
  0,
  '',
  'the people',
  true,
  [],
  ['the'],
  [1],
  [{ role: 'user' }],
  [{ content: 'the' }],
  [{ role: 'user', content: null }],
  [{ role: 'user', content: 1 }],
  [{ role: 'user', content: {} }],
  [{ role: 'user', content: ['the'] }],
  [{ role: 'user', content: [null] }],
  [{ role: 'user', content: [{ type: 'text' }] }],
  [{ role: 'user', content: [{ type: 'text', text: 1 }] }],
  [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'file:///etc/passwd' } }] }],
  [{ role: 'user', content: [{ type: 'x'.repeat(100_000) }] }],
  [{ role: 'user', content: 'forbidden' }],
  [{ role: 'user', content: many(100_000, { type: 'text', text: 'a' }) }],
  [{ role: 'root', content: 'the' }],
  [{ role: 'tool', content: 'the', tool_call_id: 'a' }],
  [{ role: ['user'], content: 'the' }],
  [{ role: 'x'.repeat(100_000), content: 'the' }],
  [{ role: 'assistant', content: 'the', tool_calls: [{}] }],
  [{ role: 'assistant', content: 'the', function_call: { name: 'f' } }],
  new Raw('[{"role":"user","__proto__":{"content":"the"}}]'),
  new Raw('[{"content":"the","__proto__":{"role":"user"}}]'),
  new Raw(`[{"role":"user","content":${nested(400, '[', ']')}}]`),
  many(20_000, { role: 'user', content: 'the people' }),
]

const wrongBodies: ReadonlyArray<string | Uint8Array> = [
  '',
  ' ',
  '\0',
  'null',
  'true',
  '1',
  'NaN',
  '"text"',
  '[]',
  '[{}]',
  '{',
  '{}}',
  "{'prompt': 'the'}",
  '{"prompt": "the",}',
  '{"prompt": NaN}',
  '{"prompt": Infinity}',
  '{"prompt": undefined}',
  '{"prompt": "the\n"}',
  'prompt=the&n=1',
  '<xml/>',
  nested(2000, '[', ']'),
  nested(500_000, '[', ']'),
  '['.repeat(500_000),
  '{"a":'.repeat(500_000),
  `[${'0,'.repeat(99_999)}0]`,
  '9'.repeat(100_000),
  Uint8Array.of(0xff, 0xfe, 0x7b, 0, 0x7d, 0),
  Uint8Array.of(0x7b, 0x22, 0xc3, 0x22, 0x3a, 0x31, 0x7d),
  Uint8Array.of(0x22, 0xed, 0xa0, 0x80, 0x22),
  new Uint8Array(1000),
]

const schema = (of: unknown) => ({ type: 'json_schema', json_schema: { name: 'a', schema: of } })
const wrongFormats = [
  'json',
  {},
  { type: 'json' },
  { type: 'json_schema' },
  { type: 'json_schema', json_schema: {} },
  { type: 'json_schema', json_schema: { schema: {} } },
  ...[null, 1, [], 'text', { type: 'any' }, { not: {} }, { type: 'string', pattern: '(?=.)' }, { $ref: '#/no' }].map(
    schema,
  ),
  schema(JSON.parse('{"type":"object","properties":{"__proto__":{"type":"nonsense"}}}')),
  schema({ type: 'string', minLength: 1e300 }),
]
const tool = (of: object) => [{ type: 'function', function: { name: 'f', ...of } }]
const wrongTools = [
  {},
  'f',
  [1],
  [{}],
  [{ type: 'function' }],
  [{ type: 'custom', custom: { name: 'f' } }],
  ...[{ name: '' }, { name: 'a b' }, { name: 'a'.repeat(65) }, { parameters: 1 }, { description: 1 }].map(tool),
]

describe.each(paths)('%s rejects', path => {
  test('bodies that are not a JSON object', async () => {
    const { app, dispose } = modelServer()
    for (const body of wrongBodies) expect((await rejection(app, path, body)).status, shown(body)).toBe(400)
    await stillServes(app)
    expect(dispose()).toBe(0)
  })

  const own =
    path === '/v1/completions'
      ? { prompt: wrongPrompts, logprobs: [...wrongNumbers, -1, 6, 0.5], echo: [0, 1, 'true', [], [true]] }
      : {
          messages: wrongMessages,
          logprobs: [0, 1, 'true', [], [true]],
          top_logprobs: [...wrongNumbers, -1, 21, 0.5],
          response_format: wrongFormats,
          tools: wrongTools,
          tool_choice: ['required', 'any', {}, { type: 'function' }, { type: 'function', function: { name: 'f' } }],
          parallel_tool_calls: [0, 1, 'true'],
        }
  const fields =
    path === '/v1/completions' ? wrongFields : { ...wrongFields, max_completion_tokens: wrongFields.max_tokens }
  test.each(Object.entries({ ...fields, ...own }))('%s of a wrong type or size', async (name, values) => {
    const { app, records, dispose } = modelServer()
    // An empty object is valid.
    const everywhere = name === 'stream_options' ? wrongEverywhere.slice(1) : wrongEverywhere
    for (const value of [...values, ...everywhere]) {
      const body = withFields(path, { [name]: value })
      const { status, param } = await rejection(app, path, body)
      expect(status, shown(body)).toBe(400)
      expect(param, shown(body)).toMatch(new RegExp(`^${name}\\b`))
    }
    expect(records.every(({ promptTokens }) => promptTokens === undefined)).toBe(true)
    await stillServes(app)
    expect(({} as { polluted?: unknown }).polluted).toBeUndefined()
    expect(dispose()).toBe(0)
  })

  test('random fields never cause an internal error', async () => {
    const { app, engine, dispose } = modelServer()
    const random = new Random(11)
    const pick = <T>(from: readonly T[]): T => from[random.integer(from.length)]
    const odd = (depth: number): unknown => {
      const kinds: ReadonlyArray<() => unknown> = [
        () => null,
        () => pick([true, false]),
        () =>
          pick([0, -0, 1, -1, 2, 0.5, 63, 64, 1e-320, 1e-30, 1e308, -1e308, 2 ** 31, 2 ** 32, 2 ** 53 - 1, 2 ** 53]),
        () => pick(['', 'the', 'tiny', '\0', '\ud800', '🙂'.slice(1), '<|end|>', 'user', 'x'.repeat(500), '__proto__']),
        () => Array.from({ length: random.integer(4) }, () => odd(depth + 1)),
        () => Object.fromEntries(Array.from({ length: random.integer(4) }, () => [pick(names), odd(depth + 1)])),
      ]
      return pick(depth > 3 ? kinds.slice(0, 4) : kinds)()
    }
    const names = [
      ...Object.keys({ ...fields, ...own }),
      'role',
      'content',
      'type',
      'text',
      'logprobs',
      'tools',
      'schema',
      'json_schema',
      'name',
      '__proto__',
      'constructor',
      'toString',
    ]
    const seen = new Map<number, number>()
    for (let i = 0; i < 600; i++) {
      const changed = Object.fromEntries(Array.from({ length: 1 + random.integer(3) }, () => [pick(names), odd(0)]))
      const body = withFields(path, changed)
      const response = await app.request(path, post(body))
      seen.set(response.status, (seen.get(response.status) ?? 0) + 1)
      if (response.status === 200) {
        expect(await response.text(), shown(body)).not.toContain('"error"')
        continue
      }
      expect([400, 404], shown(body)).toContain(response.status)
      await errorOf(response, shown(body))
    }
    expect([engine.running, engine.waiting]).toEqual([0, 0])
    // Both outcomes must occur.
    expect(seen.get(200)).toBeGreaterThan(50)
    expect(seen.get(400)).toBeGreaterThan(50)
    await stillServes(app)
    expect(dispose()).toBe(0)
  })

  test.each<[string, unknown, ReadonlyArray<unknown>, string?]>([
    ['prompt_logprobs', 1, [null, false]],
    ['tools', [{ type: 'function', function: { name: 'f' } }], [null, []]],
    ...(path === '/v1/completions'
      ? ([
          ['tool_choice', 'required', ['none', 'auto']],
          ['response_format', { type: 'json_object' }, [{ type: 'text' }]],
          ['response_format', 'json', []],
        ] as Array<[string, unknown, unknown[]]>)
      : []),
    ['functions', [{ name: 'f' }], [[]]],
    ['guided_json', { type: 'object' }, [null]],
    ['repeat_penalty', 1.1, [1]],
    ['best_of', 2, [1]],
  ])(
    'unsupported %s: %j, which would change the answer, but not values without effect',
    async (name, value, valuesWithoutEffect) => {
      const { app, dispose } = modelServer()
      const body = { ...validBodies[path], [name]: value }
      expect(await rejection(app, path, body)).toMatchObject({
        status: 400,
        param: name,
        code: 'unsupported_parameter',
      })
      for (const nothing of valuesWithoutEffect) {
        const response = await app.request(path, post({ ...validBodies[path], [name]: nothing }))
        expect(response.status, `${name}: ${JSON.stringify(nothing)}`).toBe(200)
      }
      expect(dispose()).toBe(0)
    },
  )

  test('unknown models, too many texts, and prompts that fill the context', async () => {
    const { app, dispose } = modelServer()
    for (const model of ['gpt-4o', '', '__proto__', 'TINY', '🙂'.repeat(100)]) {
      const error = await rejection(app, path, { ...validBodies[path], model })
      expect(error).toMatchObject({ status: 404, param: 'model', code: 'model_not_found' })
    }
    expect(await rejection(app, path, { ...validBodies[path], n: 65 })).toMatchObject({ status: 400, param: 'n' })
    const field = path === '/v1/completions' ? 'prompt' : 'messages'
    const long = 'the people '.repeat(60)
    const fields = field === 'prompt' ? { prompt: long } : { messages: [{ role: 'user', content: long }] }
    const error = await rejection(app, path, { ...validBodies[path], ...fields })
    expect(error).toMatchObject({ status: 400, param: field, code: 'context_length_exceeded' })
    expect(error.message).toContain('the context length of this model is 64')
    expect(dispose()).toBe(0)
  })

  test('bodies that are too long or not declared as JSON, and requests without a key', async () => {
    const bodyLimit = 300
    const { app, dispose } = modelServer({ bodyLimit, apiKey: 'open sesame', cors: ['https://moe.example'] })
    const headers = { authorization: 'Bearer open sesame', origin: 'https://moe.example' }
    const padded = (bytes: number) => {
      const body = JSON.stringify(validBodies[path])
      return body + ' '.repeat(bytes - body.length)
    }
    const ask = (body: string, more: Record<string, string> = {}) =>
      app.request(path, post(body, { headers: { ...headers, ...more }, duplex: 'half' } as RequestInit))
    expect((await ask(padded(bodyLimit))).status).toBe(200)
    const streamed = (text: string) => new Blob([text]).stream()
    const inParts = new Request(`http://localhost${path}`, {
      method: 'POST',
      headers: { ...headers, 'content-type': 'application/json' },
      body: streamed(padded(bodyLimit + 1)),
      duplex: 'half',
    } as RequestInit)
    const tooLong = [
      await ask(padded(bodyLimit + 1)),
      await ask(padded(bodyLimit + 1), { 'content-length': `${bodyLimit + 1}` }),
      await app.request(inParts),
    ]
    for (const response of tooLong) {
      expect(response.status).toBe(413)
      expect(response.headers.get('access-control-allow-origin')).toBe('https://moe.example')
      expect((await errorOf(response, 'too long')).message).toContain(`${bodyLimit} bytes`)
    }
    for (const type of [
      'text/plain',
      'application/x-www-form-urlencoded',
      'multipart/form-data; boundary=a',
      'text/json',
      'application/jsonp',
      '',
      'application/json+text',
    ]) {
      const response = await ask(padded(200), { 'content-type': type })
      expect(response.status, type).toBe(415)
      expect(response.headers.get('access-control-allow-origin')).toBe('https://moe.example')
      await errorOf(response, type)
    }
    for (const type of ['application/json; charset=utf-8', 'APPLICATION/JSON', 'application/vnd.api+json'])
      expect((await ask(padded(200), { 'content-type': type })).status, type).toBe(200)
    for (const authorization of [
      '',
      'open sesame',
      'Bearer',
      'Bearer ',
      'Bearer open',
      'Bearer open sesame!',
      'Basic open sesame',
      'Bearer OPEN SESAME',
    ]) {
      const response = await ask(padded(200), { authorization })
      expect(response.status, authorization).toBe(401)
      expect((await errorOf(response, authorization)).code).toBe('invalid_api_key')
    }
    expect(dispose()).toBe(0)
  })

  test.each([{}, { 'content-length': '50' }])('an incomplete body, with headers %j', async headers => {
    const { app, records, dispose } = modelServer()
    const body = new ReadableStream({
      start: stream => stream.enqueue(new TextEncoder().encode('{"prompt":')),
      pull: stream => stream.error(new Error('aborted')),
    })
    const init = { headers: { 'content-type': 'application/json', ...headers }, duplex: 'half' }
    const response = await app.request(path, { method: 'POST', body, ...init } as RequestInit)
    expect(response.status).toBe(400)
    expect((await errorOf(response, 'cut off')).message).toBe('the request body is incomplete')
    expect(records).toMatchObject([{ status: 400 }])
    await stillServes(app)
    expect(dispose()).toBe(0)
  })

  test.each(['GET', 'PUT', 'DELETE', 'PATCH'])('the method %s', async method => {
    const { app, dispose } = modelServer()
    const response = await app.request(path, { method })
    expect([response.status, response.headers.get('allow')]).toEqual([405, 'POST'])
    await errorOf(response, method)
    expect(dispose()).toBe(0)
  })

  test('requests from web pages of other origins', async () => {
    const preflight = (app: App, origin: string) =>
      app.request(path, {
        method: 'OPTIONS',
        headers: {
          origin,
          'access-control-request-method': 'POST',
          'access-control-request-headers': 'authorization,content-type',
        },
      })
    const none = modelServer()
    const closed = await preflight(none.app, 'https://moe.example')
    expect(closed.ok).toBe(false)
    expect(closed.headers.get('access-control-allow-origin')).toBeNull()
    none.dispose()
    // Browsers send preflight requests without a key.
    const one = modelServer({ cors: 'https://moe.example', apiKey: 'open sesame' })
    const open = await preflight(one.app, 'https://moe.example')
    expect(open.status).toBe(204)
    expect(open.headers.get('access-control-allow-origin')).toBe('https://moe.example')
    expect(open.headers.get('access-control-allow-methods')).toContain('POST')
    expect(open.headers.get('access-control-allow-headers')?.toLowerCase()).toBe('authorization,content-type')
    const other = await preflight(one.app, 'https://evil.example')
    expect(other.headers.get('access-control-allow-origin')).not.toBe('https://evil.example')
    expect(other.headers.get('access-control-allow-origin')).not.toBe('*')
    one.dispose()
    // The command passes a list.
    for (const cors of ['*', ['*']]) {
      const any = modelServer({ cors })
      const response = await preflight(any.app, 'https://evil.example')
      expect(response.headers.get('access-control-allow-origin')).toBe('*')
      any.dispose()
    }
  })
})

test('errors name token ids outside the vocabulary', async () => {
  const { app, dispose } = modelServer()
  const size = tokenizer.vocabSize
  for (const prompt of [[size], [1, size], [[1], [2, size]]]) {
    const error = await rejection(app, '/v1/completions', { ...validBodies['/v1/completions'], prompt })
    expect(error).toMatchObject({ status: 400, param: 'prompt' })
    expect(error.message).toContain(`token id ${size} is out of range`)
  }
  const last = await app.request('/v1/completions', post({ ...validBodies['/v1/completions'], prompt: [size - 1] }))
  expect(last.status).toBe(200)
  const all = { ...validBodies['/v1/completions'], prompt: many(8, 'the'), n: 9 }
  expect(await rejection(app, '/v1/completions', all)).toMatchObject({ status: 400, param: 'prompt' })
  expect(dispose()).toBe(0)
})

test.each([
  '/',
  '/v1',
  '/v1/',
  '/v1/embeddings',
  '/v1/completions/',
  '/v2/completions',
  '/..%2f..%2fetc/passwd',
  '/%ff',
  `/${'x'.repeat(5000)}`,
])('the path %s is not found', async path => {
  const { app } = scriptedServer(async function* () {})
  for (const method of ['GET', 'POST']) {
    const response = await app.request(path, { method })
    expect(response.status).toBe(404)
    expect((await errorOf(response, path)).message.length).toBeLessThan(300)
  }
})

test.each(['other', '%ff', '%E0%A4', 'tiny%2f', '__proto__', 'x'.repeat(5000)])(
  'the model %s is not found',
  async id => {
    const { app } = scriptedServer(async function* () {})
    const response = await app.request(`/v1/models/${id}`)
    expect(response.status).toBe(404)
    const { message, code } = await errorOf(response, id)
    expect(code).toBe('model_not_found')
    expect(message.length).toBeLessThan(300)
  },
)

describe.each([true, false])('over a port, with Content-Length: %s,', declared => {
  const fetchFrom = (url: string, body: unknown, signal?: AbortSignal) => {
    const text = JSON.stringify(body)
    const sent = declared ? text : new Blob([text]).stream()
    return fetch(url + paths[0], post(body, { body: sent, duplex: 'half', signal } as RequestInit))
  }

  test('serve rejects anything that is not an application', async () => {
    const expected = {
      code: 'E_ATTR',
      message: expect.stringMatching(/expected an application with a fetch method, got .*; pass createServer\(\{/),
    }
    for (const app of [undefined, {}, 'app'])
      await expect(serve(app as never, { port: 0 })).rejects.toMatchObject(expected)
  })

  test('a body is accepted up to the limit', async () => {
    const { app, dispose } = modelServer({ bodyLimit: 2 ** 20 })
    const server = await serve(app, { port: 0 })
    const ask = validBodies[paths[0]]
    for (const padding of [0, 2 ** 19, 2 ** 20, 2 ** 24, 0]) {
      const response = await fetchFrom(server.url, { ...ask, user: 'x'.repeat(padding) })
      expect(response.status, `${padding}`).toBe(padding < 2 ** 20 ? 200 : 413)
      if (response.status === 200) expect(((await response.json()) as Completion).choices).toHaveLength(1)
      else expect((await errorOf(response, `${padding}`)).code).toBe('request_too_large')
    }
    await server.close({ timeout: 0 })
    expect(dispose()).toBe(0)
  })

  test.each([true, false])('disconnecting stops generation, streamed: %s', async stream => {
    const abort = new AbortController()
    let end = () => {}
    const ended = new Promise<void>(resolve => {
      end = resolve
    })
    const { app, records } = scriptedServer(async function* ({ options }) {
      try {
        while (!options.signal?.aborted) {
          await new Promise(setImmediate)
          yield 'on and '
          setTimeout(() => abort.abort(), 20)
        }
        throw new MoeError({ code: 'E_ABORTED', op: 'generate', problem: 'was aborted' })
      } finally {
        end()
      }
    })
    const server = await serve(app, { port: 0 })
    const response = fetchFrom(server.url, { prompt: 'the', stream }, abort.signal)
    await response.then(({ text }) => text()).catch(() => {})
    await ended
    await server.close({ timeout: 0 })
    expect(records).toMatchObject([{ status: 499 }])
  })
})

test.each([
  'GET /v1/models HTTP/1.1\r\nHost: [\r\nConnection: close\r\n\r\n',
  'GET /v1/models HTTP/1.1\r\nHost: a b\r\nConnection: close\r\n\r\n',
  'GET //[ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n',
  'GET http://[/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n',
  'GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n',
  'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n{}',
  'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}',
  'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n',
  `GET /${'x'.repeat(20_000)} HTTP/1.1\r\nHost: a\r\n\r\n`,
  '\x16\x03\x01\x02\x00\x01\x00\r\n\r\n',
])('an invalid HTTP request is rejected, and the server continues: %j', async sent => {
  const { app, records, dispose } = modelServer()
  const server = await serve(app, { port: 0 })
  const received = await new Promise<string>(resolve => {
    let text = ''
    const socket = connect(server.port, '127.0.0.1', () => socket.write(sent))
    socket.on('data', data => {
      text += data
    })
    // The server does not read the rest of a request that is too long, so that sending may fail.
    socket.on('error', () => {})
    socket.on('close', () => resolve(text))
  })
  expect(received).toMatch(/^HTTP\/1\.1 4\d\d /)
  const response = await fetch(`${server.url}/v1/completions`, post(validBodies['/v1/completions']))
  expect(response.status).toBe(200)
  await response.text()
  await server.close({ timeout: 0 })
  expect(records.every(({ status }) => status < 500)).toBe(true)
  expect(dispose()).toBe(0)
})

test('metrics count requests by path and status, and tokens', async () => {
  const { app, records, dispose } = modelServer()
  const [completions, chat] = paths
  type Usage = NonNullable<Completion['usage']>
  const usages: Usage[] = []
  for (const body of [validBodies[completions], { ...validBodies[completions], n: 2 }])
    usages.push(((await (await app.request(completions, post(body))).json()) as Completion).usage as Usage)
  const streamed = { ...validBodies[chat], stream: true, stream_options: { include_usage: true } }
  const all = (await events(await app.request(chat, post(streamed)))) as Completion[]
  usages.push(all[all.length - 2].usage as Usage)
  await rejection(app, completions, '{')
  await rejection(app, completions, { prompt: [], n: 1 })
  await rejection(app, chat, { ...validBodies[chat], model: 'other' })
  for (const path of ['/a', '/b{x="y"}', '/c%0Ad']) await app.request(path)
  await app.request('/health')
  const response = await app.request('/metrics')
  expect(response.headers.get('content-type')).toBe('text/plain; version=0.0.4; charset=utf-8')
  const text = await response.text()
  const samples = new Map(
    text
      .split('\n')
      .filter(line => line !== '' && !line.startsWith('#'))
      .map(line => {
        const [, name, value] = /^([a-z_]+(?:\{path="[\w/]+",status="\d+"\})?) ([\d.e+-]+)$/.exec(line) ?? []
        expect(name, line).toBeDefined()
        return [name, Number(value)]
      }),
  )
  const seconds = samples.get('moe_request_seconds_sum')
  samples.delete('moe_request_seconds_sum')
  const sum = (of: 'prompt_tokens' | 'completion_tokens') => usages.reduce((all, usage) => all + usage[of], 0)
  expect(Object.fromEntries(samples)).toEqual({
    'moe_requests_total{path="/v1/completions",status="200"}': 2,
    'moe_requests_total{path="/v1/completions",status="400"}': 2,
    'moe_requests_total{path="/v1/chat/completions",status="200"}': 1,
    'moe_requests_total{path="/v1/chat/completions",status="404"}': 1,
    'moe_requests_total{path="other",status="404"}': 3,
    'moe_requests_total{path="/health",status="200"}': 1,
    moe_texts_running: 0,
    moe_texts_waiting: 0,
    moe_prompt_tokens_total: sum('prompt_tokens'),
    moe_generated_tokens_total: sum('completion_tokens'),
    moe_request_seconds_count: 3,
  })
  const served = records.filter(({ status }) => status === 200).filter(({ promptTokens }) => promptTokens !== undefined)
  expect(seconds).toBeCloseTo(
    served.reduce((all, record) => all + record.seconds, 0),
    9,
  )
  expect(dispose()).toBe(0)
})
