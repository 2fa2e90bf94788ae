/** @file The server with OpenAI's client library, over a port. */
import OpenAI, { APIError, AuthenticationError, BadRequestError, InternalServerError, NotFoundError } from 'openai'
import { expect, onTestFinished, test } from 'vitest'
import { serve } from './index.ts'
import { modelServer, scriptedServer, tokenizer } from './test-server.ts'

async function client(app: Parameters<typeof serve>[0], apiKey = 'any') {
  const server = await serve(app, { port: 0 })
  onTestFinished(() => server.close({ timeout: 0 }))
  return new OpenAI({ baseURL: `${server.url}/v1`, apiKey, maxRetries: 0 })
}

const messages = [
  { role: 'developer' as const, content: 'of the people' },
  {
    role: 'user' as const,
    content: [
      { type: 'text' as const, text: 'the better ' },
      { type: 'text' as const, text: 'angels' },
    ],
  },
]

const eventually = async (condition: () => boolean) => {
  while (!condition()) await new Promise(resolve => setTimeout(resolve, 5))
}

test('lists and describes the model', async () => {
  const { app, dispose } = modelServer()
  const openai = await client(app)
  const [model] = (await openai.models.list()).data
  expect(model).toMatchObject({ id: 'tiny', object: 'model', owned_by: 'moe' })
  expect(await openai.models.retrieve('tiny')).toEqual(model)
  await expect(openai.models.retrieve('other')).rejects.toThrow(NotFoundError)
  dispose()
})

test('chats, streamed or not, return what the model generates for the rendered template', async () => {
  const { app, model, dispose } = modelServer()
  const openai = await client(app)
  const ask = { model: 'tiny', messages, max_completion_tokens: 14, temperature: 0.8, seed: 7 }
  const whole = await openai.chat.completions.create(ask)
  const text = '<|begin|><|user|>system: of the people<|user|>user: the better angels<|assistant|>'
  const ids = tokenizer.encode(text)
  let expected = ''
  const generation = model.generate(ids, { tokenizer, maxTokens: 14, temperature: 0.8, seed: 7 })
  for await (const part of generation) expected += part
  expect(whole.object).toBe('chat.completion')
  expect(whole.choices[0].message).toEqual({ role: 'assistant', content: expected, refusal: null })
  expect(whole.usage).toMatchObject({ prompt_tokens: ids.length, completion_tokens: generation.stats.tokens })

  const stream = await openai.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })
  let streamed = ''
  const roles: unknown[] = []
  const ends: unknown[] = []
  let usage: unknown
  for await (const chunk of stream) {
    expect(chunk.object).toBe('chat.completion.chunk')
    for (const { delta, finish_reason: end } of chunk.choices) {
      streamed += delta.content ?? ''
      if (delta.role) roles.push(delta.role)
      if (end) ends.push(end)
    }
    if (chunk.usage) usage = chunk.usage
  }
  expect(streamed).toBe(expected)
  expect([roles, ends]).toEqual([['assistant'], [whole.choices[0].finish_reason]])
  expect(usage).toMatchObject({ completion_tokens: generation.stats.tokens })
  expect(dispose()).toBe(0)
})

test('errors have the expected classes of the client library', async () => {
  const { app, dispose } = modelServer({ apiKey: 'open sesame' })
  const wrong = await client(app)
  const request = { model: 'tiny', prompt: 'the' }
  await expect(wrong.completions.create(request)).rejects.toThrow(AuthenticationError)
  const openai = await client(app, 'open sesame')
  expect((await openai.completions.create(request)).choices).toHaveLength(1)
  await expect(openai.completions.create({ ...request, model: 'gpt-4o' })).rejects.toMatchObject({
    constructor: NotFoundError,
    code: 'model_not_found',
    message: '404 unknown model "gpt-4o": this server serves "tiny"',
  })
  const long = openai.completions.create({ ...request, prompt: 'the people '.repeat(40) })
  const length = tokenizer.encode('the people '.repeat(40)).length
  await expect(long).rejects.toMatchObject({
    constructor: BadRequestError,
    code: 'context_length_exceeded',
    param: 'prompt',
    type: 'invalid_request_error',
    message: `400 the prompt has ${length} tokens, but the context length of this model is 64, including at least one for the answer: shorten the prompt`,
  })
  await expect(openai.completions.create({ ...request, logprobs: 6 })).rejects.toMatchObject({ param: 'logprobs' })
  dispose()
})

test('an internal error has status 500, and in a stream is an event that the client throws', async () => {
  const failing = scriptedServer(async function* (_, stats) {
    stats.tokens = 1
    yield 'well'
    throw new Error('a kernel failed')
  })
  const openai = await client(failing.app)
  await expect(openai.completions.create({ model: 'tiny', prompt: 'the' })).rejects.toThrow(InternalServerError)
  const stream = await openai.completions.create({ model: 'tiny', prompt: 'the', stream: true })
  const seen: string[] = []
  const reading = (async () => {
    for await (const { choices } of stream) seen.push(choices[0].text)
  })()
  await expect(reading).rejects.toMatchObject({ constructor: APIError, type: 'server_error', code: 'internal_error' })
  expect(seen).toEqual(['well'])
  expect(failing.records.map(({ status, error }) => [status, (error as Error).message])).toEqual([
    [500, 'a kernel failed'],
    [500, 'a kernel failed'],
  ])
})

test.each([true, false])('disconnecting stops generation, streamed: %s', async stream => {
  let ended = 0
  const endless = scriptedServer(async function* ({ options }, stats) {
    try {
      for (;;) {
        await new Promise(setImmediate)
        if (options.signal?.aborted)
          throw Object.assign(new Error('generate: was aborted'), { name: 'MoeError', code: 'E_ABORTED' })
        stats.tokens++
        yield 'on and '
      }
    } finally {
      ended++
    }
  })
  const openai = await client(endless.app)
  const abort = new AbortController()
  const ask = { model: 'tiny', messages: [{ role: 'user' as const, content: 'the' }], n: 2, stream }
  const reading = (async () => {
    const answer = await openai.chat.completions.create(ask, { signal: abort.signal })
    if (Symbol.asyncIterator in answer)
      for await (const { choices } of answer) if (choices[0].delta.content) abort.abort()
  })()
  if (!stream) eventually(() => endless.engine.calls.length === 2).then(() => abort.abort())
  await reading.catch(() => {})
  await eventually(() => endless.records.length > 0)
  expect(ended).toBe(2)
  expect(endless.records).toMatchObject([{ status: 499 }])
})

test('concurrent clients get the same texts as alone, and one that disconnects does not delay the other', async () => {
  const { app, engine, dispose } = modelServer()
  const openai = await client(app)
  const ask = (seed: number) => ({ model: 'tiny', prompt: 'the people', max_tokens: 20, temperature: 1, seed })
  const text = async (seed: number) => (await openai.completions.create(ask(seed))).choices[0].text
  const alone = [await text(1), await text(2), await text(3)]
  expect(await Promise.all([text(1), text(2), text(3)])).toEqual(alone)
  const stream = await openai.completions.create({ ...ask(4), max_tokens: 60, stream: true })
  const next = text(2)
  for await (const _ of stream) break
  expect(await next).toBe(alone[1])
  await eventually(() => engine.running === 0)
  expect(engine.waiting).toBe(0)
  expect(dispose()).toBe(0)
})
