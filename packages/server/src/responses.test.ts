/** @file The Responses API with OpenAI's client library over a port, compared with chat completions. */
import { Random } from '@moe/core'
import { ChatTemplate, plainChatTemplate } from '@moe/tokenizer-bpe/data'
import OpenAI, { BadRequestError } from 'openai'
import { zodTextFormat } from 'openai/helpers/zod'
import type {
  Response,
  ResponseCreateParamsNonStreaming,
  ResponseOutputMessage,
  ResponseStreamEvent,
} from 'openai/resources/responses/responses'
import { describe, expect, onTestFinished, test } from 'vitest'
import { z } from 'zod'
import { serve } from './index.ts'
import { bytewise, modelServer, post, scriptedServer, tokenizer } from './test-server.ts'

type Ask = Partial<ResponseCreateParamsNonStreaming> & Record<string, unknown>

async function client(app: Parameters<typeof serve>[0]) {
  const server = await serve(app, { port: 0 })
  onTestFinished(() => server.close({ timeout: 0 }))
  return new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'any', maxRetries: 0 })
}

const plain = await ChatTemplate.from({
  chat_template: plainChatTemplate,
  bos_token: '<|begin|>',
  eos_token: '<|end|>',
})
const thinking = await ChatTemplate.from({
  chat_template:
    '{# </think> tools #}{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.reasoning_content %} ({{ m.reasoning_content }}){% endif %};{% endfor %}',
})

/** A server whose model generates these parts of a text. */
function serverThatGenerates(parts: readonly string[], chatTemplate = plain, reason: 'stop' | 'length' = 'stop') {
  return scriptedServer(
    async function* (_, stats) {
      yield* parts
      stats.tokens = parts.length
      stats.finishReason = reason
    },
    { chatTemplate },
    4096,
  )
}

const withoutIds = (value: unknown): unknown =>
  JSON.parse(JSON.stringify(value), (key, one) =>
    ['id', 'item_id', 'call_id', 'created_at', 'cached_tokens'].includes(key) ? '' : one,
  )

/** Requests a response with and without streaming, and checks that the events are consistent and end with the same response. */
async function createBoth(openai: OpenAI, ask: Ask): Promise<Response> {
  const body = { model: 'tiny', input: 'the better angels', seed: 3, ...ask }
  const whole = await openai.responses.create(body)
  const events: ResponseStreamEvent[] = []
  for await (const event of await openai.responses.create({ ...body, stream: true })) events.push(event)
  expect(events.map(({ sequence_number: number }) => number)).toEqual(events.map((_, i) => i))
  expect(events.slice(0, 2).map(({ type }) => type)).toEqual(['response.created', 'response.in_progress'])
  const last = events[events.length - 1]
  if (last.type !== 'response.completed' && last.type !== 'response.incomplete') throw new Error(last.type)
  expect(last.type).toBe(`response.${whole.status}`)
  const { output_text: _, ...bare } = whole
  expect(withoutIds(last.response)).toEqual(withoutIds(bare))
  const texts = new Map<string, string>()
  const open: string[] = []
  for (const event of events) {
    if (event.type === 'response.output_item.added') open.push(event.item.id as string)
    if (event.type === 'response.output_item.done') {
      expect(open.pop()).toBe(event.item.id)
      expect(last.response.output[event.output_index]).toEqual(event.item)
    }
    const isDelta = /delta$/.test(event.type)
    if ('item_id' in event) expect(open).toEqual([event.item_id])
    if ('item_id' in event && isDelta) {
      texts.set(event.item_id, (texts.get(event.item_id) ?? '') + (event as { delta: string }).delta)
    }
    if (event.type === 'response.output_text.done' || event.type === 'response.reasoning_text.done')
      expect(event.text).toBe(texts.get(event.item_id) ?? '')
    if (event.type === 'response.output_text.done') {
      const [content] = (last.response.output[event.output_index] as ResponseOutputMessage).content
      expect(content).toMatchObject({ text: event.text, logprobs: event.logprobs })
    }
    if (event.type === 'response.function_call_arguments.done') expect(event.arguments).toBe(texts.get(event.item_id))
  }
  return whole
}

test('the text equals that of a chat completion, streamed or not', async () => {
  const { app, dispose } = modelServer()
  const openai = await client(app)
  const sampling = { temperature: 0.8, seed: 7, top_p: 0.9 }
  const messages = [
    { role: 'developer' as const, content: 'of the people' },
    { role: 'user' as const, content: 'the better angels' },
  ]
  const chat = await openai.chat.completions.create({ model: 'tiny', messages, ...sampling, max_tokens: 9 })
  const ask = { instructions: 'of the people', ...sampling, max_output_tokens: 9 }
  const response = await createBoth(openai, ask)
  expect(response.output_text).toBe(chat.choices[0].message.content)
  const isCut = chat.choices[0].finish_reason === 'length'
  expect(response).toMatchObject({
    object: 'response',
    status: isCut ? 'incomplete' : 'completed',
    incomplete_details: isCut ? { reason: 'max_output_tokens' } : null,
    model: 'tiny',
    instructions: 'of the people',
    temperature: 0.8,
    max_output_tokens: 9,
    store: false,
    usage: {
      input_tokens: chat.usage?.prompt_tokens,
      input_tokens_details: { cache_write_tokens: 0 },
      output_tokens: chat.usage?.completion_tokens,
    },
  })
  const input = [messages[0], { ...messages[1], content: [{ type: 'input_text' as const, text: 'the better angels' }] }]
  expect((await createBoth(openai, { ...ask, instructions: null, input })).output_text).toBe(response.output_text)
  expect(dispose()).toBe(0)
})

test('a response repeats the fields of its request, with their defaults', async () => {
  const { app } = serverThatGenerates(['so'])
  const openai = await client(app)
  const defaults = {
    ...{
      instructions: null,
      max_output_tokens: null,
      metadata: {},
      parallel_tool_calls: true,
      temperature: 1,
      top_p: 1,
    },
    ...{ text: { format: { type: 'text' } }, tool_choice: 'auto', tools: [], truncation: 'disabled', store: false },
    reasoning: { effort: null, summary: null },
  }
  expect(await openai.responses.create({ model: 'tiny', input: 'the' })).toMatchObject(defaults)
  const own = {
    ...{ instructions: 'Be brief.', max_output_tokens: 4, metadata: { a: 'b' }, parallel_tool_calls: false },
    ...{
      temperature: 0.5,
      top_p: 0.25,
      text: { format: { type: 'json_object' as const } },
      tool_choice: 'none' as const,
    },
    tools: [tool],
  }
  const parsed = await openai.responses.create({ model: 'tiny', input: 'the', ...own })
  expect(parsed).toMatchObject({ ...defaults, ...own })
})

test('the text matches the requested schema, and the client parses it', async () => {
  const { app, dispose } = modelServer({}, { context: 300 })
  const openai = await client(app)
  const Speech = z.object({ year: z.int().min(1790).max(1800), kind: z.enum(['speech', 'letter']) })
  let ended = 0
  for (let seed = 0; seed < 5; seed++) {
    const ask = { model: 'tiny', input: 'the', temperature: 1.5, text: { format: zodTextFormat(Speech, 'speech') } }
    const { output_parsed: parsed, status } = await openai.responses.parse({ ...ask, seed } as typeof ask)
    if (status !== 'completed') continue
    ended++
    expect(Speech.safeParse(parsed).success).toBe(true)
  }
  expect(ended).toBeGreaterThan(2)
  const cut = await createBoth(openai, { text: { format: { type: 'json_object' } }, max_output_tokens: 2 })
  expect([cut.status, cut.output_text[0]]).toEqual(['incomplete', '{'])
  expect(dispose()).toBe(0)
})

const tool = {
  type: 'function' as const,
  name: 'look_up',
  strict: true,
  parameters: { type: 'object', properties: { year: { type: 'integer' } }, required: ['year'] },
}

describe('tools', () => {
  test('are called, and the conversation continues with their results', async () => {
    const call = '<tool_call>{"name": "look_up", "arguments": {"year": 1865}}</tool_call>'
    const { app, engine } = serverThatGenerates(['I l', 'ook.\n', call.slice(0, 15), call.slice(15), call])
    const openai = await client(app)
    const { output } = await createBoth(openai, { tools: [tool] })
    const own = { type: 'function_call', name: 'look_up', arguments: '{"year":1865}', status: 'completed' }
    expect(output).toMatchObject([{ type: 'message', content: [{ text: 'I look.\n' }] }, own, own])
    const [, first, second] = output
    if (first.type !== 'function_call' || second.type !== 'function_call') throw new Error('no calls')
    expect(first.call_id).toMatch(/^call_/)
    expect(first.call_id).not.toBe(second.call_id)
    const input = [
      { role: 'user' as const, content: 'the better angels' },
      ...output,
      { type: 'function_call_output' as const, call_id: first.call_id, output: 'malice' },
      {
        type: 'function_call_output' as const,
        call_id: second.call_id,
        output: [{ type: 'input_text', text: 'none' }],
      },
    ]
    await openai.responses.create({ model: 'tiny', input: input as never, tools: [tool] })
    const rendered = '<tool_call>\n{"name": "look_up", "arguments": {"year":1865}}\n</tool_call>'
    expect(tokenizer.decode(engine.calls[engine.calls.length - 1].ids)).toContain(
      `User: the better angels\n\nAssistant: I look.\n\n${rendered}${rendered}<|end|>Tool: malice\n\nTool: none\n\n`,
    )
  })

  test('are called if required', async () => {
    const { app, dispose } = modelServer({ chatTemplate: plain }, { context: 1200 })
    const openai = await client(app)
    const named = { type: 'function' as const, name: 'look_up' }
    const allowed = { type: 'allowed_tools' as const, mode: 'required' as const, tools: [named] }
    for (const choice of [named, allowed]) {
      const ask = { tools: [tool], tool_choice: choice, max_output_tokens: 60 }
      const { output } = await createBoth(openai, ask as never)
      expect(output).toMatchObject([{ type: 'function_call', name: 'look_up' }])
    }
    expect(dispose()).toBe(0)
  })
})

test('reasoning is a separate item, which can be sent back', async () => {
  const { app, engine } = serverThatGenerates(['<thi', 'nk>\nso', ' it is</think>\n', '\nYes', '.'], thinking)
  const openai = await client(app)
  const { output, output_text: text } = await createBoth(openai, {})
  expect(text).toBe('Yes.')
  expect(output).toMatchObject([
    { type: 'reasoning', summary: [], content: [{ type: 'reasoning_text', text: 'so it is' }], status: 'completed' },
    { type: 'message', role: 'assistant', status: 'completed' },
  ])
  const input = [{ role: 'user' as const, content: 'a' }, ...output, { role: 'user' as const, content: 'b' }]
  await openai.responses.create({ model: 'tiny', input: input as never })
  expect(tokenizer.decode(engine.calls[engine.calls.length - 1].ids)).toBe(
    'user: a;assistant: Yes. (so it is);user: b;',
  )
  const cut = await createBoth(await client(serverThatGenerates(['<think>so'], thinking, 'length').app), {})
  expect(cut).toMatchObject({ status: 'incomplete', output: [{ type: 'reasoning', status: 'incomplete' }] })
})

test('usage counts the tokens of reasoning, also in chats', async () => {
  const parts = ['<thi', 'nk>so', ' it is', '</think>', 'Yes', '.']
  const { app } = scriptedServer(
    async function* (_, stats) {
      for (const part of parts) {
        stats.tokens++
        yield part
      }
    },
    { chatTemplate: thinking },
    4096,
  )
  const openai = await client(app)
  const { usage } = await createBoth(openai, {})
  expect(usage).toMatchObject({ output_tokens: 6, output_tokens_details: { reasoning_tokens: 3 } })
  const ask = { model: 'tiny', messages: [{ role: 'user' as const, content: 'a' }], n: 2 }
  const chat = await openai.chat.completions.create(ask)
  expect(chat.usage).toMatchObject({ completion_tokens: 12, completion_tokens_details: { reasoning_tokens: 6 } })
  const stream = await openai.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })
  for await (const chunk of stream) if (chunk.usage) expect({ ...chunk.usage }).toEqual({ ...chat.usage })
})

test('a response without text contains an empty message', async () => {
  const { output, status } = await createBoth(await client(serverThatGenerates([]).app), {})
  expect([status, output]).toMatchObject(['completed', [{ type: 'message', content: [{ text: '' }] }]])
})

test('log-probabilities are included on request', async () => {
  const { app, dispose } = modelServer()
  const openai = await client(app)
  const include = ['message.output_text.logprobs'] as const
  const { output } = await createBoth(openai, { include: [...include], top_logprobs: 2, max_output_tokens: 4 })
  const [message] = output
  if (message.type !== 'message' || message.content[0].type !== 'output_text') throw new Error('no text')
  expect(message.content[0].logprobs?.length).toBeGreaterThan(0)
  expect(message.content[0].logprobs?.every(({ top_logprobs: top }) => top.length === 2)).toBe(true)
  expect(dispose()).toBe(0)
})

test.each([
  [
    '<think>so it is</think>\n\nYes <b>, I look.\n<tool_call>{"name": "stop", "arguments": {}}</tool_call>',
    'Yes <b>, I look.\n',
  ],
  [' \nYes <', ' \nYes <'],
  ['<think>so', undefined],
])('log-probabilities are those of the tokens of the message: %j', async (generated, message) => {
  const { app } = scriptedServer(
    async function* (_, stats, logProbs) {
      stats.finishReason = 'stop'
      for (const token of bytewise(generated)) {
        stats.tokens++
        logProbs.push({ token, logProb: -1, top: [] })
        yield tokenizer.decode([token])
      }
    },
    { chatTemplate: thinking },
    4096,
  )
  const tool = { type: 'function' as const, name: 'stop', parameters: {}, strict: false }
  const ask = { include: ['message.output_text.logprobs' as const], tools: [tool] }
  const { output } = await createBoth(await client(app), ask)
  const contents = output.flatMap(item => (item.type === 'message' ? item.content : []))
  const texts = contents.map(part => part.type === 'output_text' && part.logprobs?.map(({ token }) => token).join(''))
  expect(texts).toEqual(message === undefined ? [] : [message])
})

test('an error in a stream is an event', async () => {
  const failing = scriptedServer(async function* () {
    yield 'well'
    throw new Error('a kernel failed')
  })
  const response = await failing.app.request('/v1/responses', post({ input: 'the', stream: true }))
  const text = await response.text()
  expect(text).toContain('event: error\ndata: {"type":"error","sequence_number":5,"code":"internal_error",')
  expect(text).not.toContain('response.completed')
  expect(text).not.toContain('[DONE]')
  expect(failing.records).toMatchObject([{ status: 500 }])
})

test('random fields never cause an internal error', async () => {
  const { app, engine, dispose } = modelServer()
  const random = new Random(12)
  const pick = <T>(from: readonly T[]): T => from[random.integer(from.length)]
  const names = [
    'type',
    'role',
    'content',
    'text',
    'format',
    'name',
    'arguments',
    'output',
    'call_id',
    'schema',
    'summary',
  ]
  const fields = [
    'input',
    'instructions',
    'tools',
    'tool_choice',
    'text',
    'include',
    'top_logprobs',
    'metadata',
    'stream',
  ]
  const words = [
    'message',
    'function_call',
    'function_call_output',
    'reasoning',
    'user',
    'assistant',
    'input_text',
    '{}',
  ]
  const randomValue = (depth: number): unknown => {
    const kinds: ReadonlyArray<() => unknown> = [
      () => pick([null, true, false, 0, -1, 0.5, 1e308, '', '__proto__', '\ud800']),
      () => pick(words),
      () => Array.from({ length: random.integer(4) }, () => randomValue(depth + 1)),
      () => Object.fromEntries(Array.from({ length: random.integer(4) }, () => [pick(names), randomValue(depth + 1)])),
    ]
    return pick(depth > 4 ? kinds.slice(0, 2) : kinds)()
  }
  const item = () => ({
    type: pick([...words.slice(0, 4), undefined]),
    role: pick(['user', 'assistant']),
    content: randomValue(1),
  })
  const seen = new Map<number, number>()
  for (let i = 0; i < 400; i++) {
    const given = random.next() < 0.7 ? { input: Array.from({ length: 1 + random.integer(3) }, item) } : {}
    const more = Object.fromEntries(Array.from({ length: random.integer(2) }, () => [pick(fields), randomValue(0)]))
    const body = { input: 'the', max_output_tokens: 2, ...given, ...more }
    const response = await app.request('/v1/responses', post(body))
    const text = await response.text()
    seen.set(response.status, (seen.get(response.status) ?? 0) + 1)
    expect([200, 400], JSON.stringify(body)).toContain(response.status)
    if (response.status === 400) expect(JSON.parse(text).error.message, JSON.stringify(body)).toMatch(/\S/)
    else expect(text).not.toContain('event: error')
  }
  expect(Math.min(seen.get(200) ?? 0, seen.get(400) ?? 0)).toBeGreaterThan(50)
  expect([engine.running, engine.waiting]).toEqual([0, 0])
  expect(dispose()).toBe(0)
})

test.each<[Ask, string, string]>([
  [{ previous_response_id: 'resp_1' }, 'previous_response_id', 'this server stores nothing'],
  [{ conversation: 'conv_1' }, 'conversation', 'this server stores nothing'],
  [{ store: true }, 'store', 'send store: false'],
  [{ background: true }, 'background', 'is not supported'],
  [{ truncation: 'auto' }, 'truncation', 'is not supported'],
  [{ input: [] }, 'input', ''],
  [{ input: 5 as never }, 'input', 'expected a string or a list of items'],
  [{ input: [{ type: 'item_reference', id: 'msg_1' }] }, 'input[0]', 'send the item itself'],
  [{ input: [{ type: 'web_search_call' }] as never }, 'input[0]', 'unsupported type, expected one of message'],
  [{ input: [{ role: 'root', content: 'a' }] as never }, 'input[0].role', 'expected one of'],
  [
    {
      instructions: 'a',
      input: [
        { role: 'user', content: 'a' },
        { role: 'user', content: [{ type: 'input_image', image_url: 'a', detail: 'auto' }] },
      ],
    },
    'input[1].content[0]',
    'parts of type input_image are not supported',
  ],
  [
    { input: [{ type: 'function_call', call_id: 'a', name: 'f', arguments: '{' }] },
    'input[0]',
    'does not support tool calls',
  ],
  [{ instructions: 'forbidden' }, 'input', 'no such words'],
  [{ input: 'the people '.repeat(60) }, 'input', 'but the context length of this model'],
  [{ tools: [{ type: 'web_search' }] as never }, 'tools[0].type', 'the only supported type of tools'],
  [{ tools: [{ ...tool, name: 'a b' }] }, 'tools[0].name', 'expected up to 64'],
  [{ tools: [tool] }, 'tools', 'does not support tools'],
  [{ tool_choice: 'required' }, 'tool_choice', 'requires tools'],
  [
    { text: { format: { type: 'json_schema', name: 'a', schema: { not: {} } } } },
    'text.format.schema',
    'text.format.schema: not is not supported',
  ],
  [{ text: { format: { type: 'grammar' } as never } }, 'text.format.type', 'expected text'],
  [{ max_output_tokens: -1 }, 'max_output_tokens', ''],
  [{ model: 'gpt-5' }, 'model', 'unknown model'],
])('rejects %j by name: %s', async (ask, param, message) => {
  const { app, dispose } = modelServer()
  const openai = await client(app)
  const asking = openai.responses.create({ model: 'tiny', input: 'the', ...ask } as ResponseCreateParamsNonStreaming)
  await expect(asking).rejects.toMatchObject({ param, message: expect.stringContaining(message) })
  if (ask.model === undefined) await expect(asking).rejects.toThrow(BadRequestError)
  expect(dispose()).toBe(0)
})
