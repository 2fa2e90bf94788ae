/** @file Structured outputs and tool calls with OpenAI's client library. */
import { Random } from '@moe/core'
import { ChatTemplate, plainChatTemplate } from '@moe/tokenizer-bpe/data'
import { Ajv2020 } from 'ajv/dist/2020.js'
import OpenAI, { BadRequestError } from 'openai'
import type { ChatCompletionCreateParams, ChatCompletionTool } from 'openai/resources/chat/completions'
import { describe, expect, onTestFinished, test } from 'vitest'
import { serve } from './index.ts'
import { chatTemplate, modelServer, scriptedServer, tokenizer } from './test-server.ts'

const plain = await ChatTemplate.from({
  chat_template: plainChatTemplate,
  bos_token: '<|begin|>',
  eos_token: '<|end|>',
})
const ajv = new Ajv2020({ strict: false })

async function client(app: Parameters<typeof serve>[0]) {
  const server = await serve(app, { port: 0 })
  onTestFinished(() => server.close({ timeout: 0 }))
  return new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'any', maxRetries: 0 })
}

const messages = [{ role: 'user' as const, content: 'the better angels' }]
const schema = {
  type: 'object',
  properties: {
    kind: { enum: ['speech', 'letter'] },
    year: { type: 'integer', minimum: 1790, maximum: 2024 },
    words: { type: 'array', items: { type: 'string', maxLength: 6 }, maxItems: 2 },
  },
  required: ['kind', 'year'],
  additionalProperties: false,
}
const format = { type: 'json_schema' as const, json_schema: { name: 'address', strict: true, schema } }
const tools: ChatCompletionTool[] = [
  { type: 'function', function: { name: 'look_up', description: 'an address', parameters: schema } },
  {
    type: 'function',
    function: { name: 'look', parameters: { type: 'object', properties: { at: { type: 'boolean' } } } },
  },
  { type: 'function', function: { name: 'stop' } },
]

/** Requests choices with and without streaming, and checks that both are equal. */
async function createBoth(openai: OpenAI, ask: Omit<ChatCompletionCreateParams, 'stream' | 'model' | 'messages'>) {
  const body = { model: 'tiny', messages, ...ask }
  const whole = await openai.chat.completions.create(body)
  const parts = await openai.chat.completions.create({ ...body, stream: true })
  const bare = whole.choices.map(({ finish_reason: end, message: { content, tool_calls: calls = [] } }) => ({
    content: content ?? '',
    calls: calls.map(call => call.type === 'function' && call.function),
    end,
  }))
  const streamed = bare.map(() => ({ content: '', calls: [] as object[], end: '' }))
  for await (const { choices } of parts) {
    for (const { index, delta, finish_reason: end } of choices) {
      const text = streamed[index]
      text.content += delta.content ?? ''
      for (const { index: i, function: call } of delta.tool_calls ?? []) text.calls[i] = call as object
      text.end = end ?? text.end
    }
  }
  expect(streamed).toEqual(bare)
  return whole.choices
}

describe.each([false, true])('with speculative decoding: %s', speculative => {
  test('finished texts of a random model are JSON that matches the schema, streamed or not', async () => {
    const { app, dispose } = modelServer({}, { context: 250, speculative })
    const openai = await client(app)
    const validate = ajv.compile(schema)
    const random = new Random(4)
    let ended = 0
    for (let seed = 0; seed < 6; seed++) {
      const ask = {
        seed,
        n: 1 + random.integer(3),
        temperature: [0, 0.7, 1.5][seed % 3],
        response_format: format,
        logprobs: seed % 2 === 0,
        ...(seed % 4 === 3 && { repetition_penalty: 1.2, top_p: 0.9 }),
      }
      for (const { finish_reason: end, message } of await createBoth(openai, ask)) {
        // Invalid UTF-8 is skipped, as in grammars.test.ts.
        if (end === 'length' || message.content?.includes('\ufffd')) continue
        ended++
        expect(end).toBe('stop')
        expect(validate(JSON.parse(message.content as string)), message.content as string).toBe(true)
      }
    }
    expect(ended).toBeGreaterThan(4)
    expect(dispose()).toBe(0)
  })
})

test('json_object allows any object, and the token limit may truncate a text', async () => {
  const { app, dispose } = modelServer({}, { context: 250 })
  const openai = await client(app)
  let ended = 0
  for (let seed = 0; seed < 6; seed++) {
    const ask = { seed, temperature: 2, max_tokens: 60, response_format: { type: 'json_object' as const } }
    const [{ message, finish_reason: end }] = await createBoth(openai, ask)
    if (end === 'stop') expect(JSON.parse(message.content as string)).toEqual(expect.any(Object))
    if (end === 'stop') ended++
    expect(message.content).toMatch(/^\{/)
  }
  expect(ended).toBeGreaterThan(0)
  const cut = { model: 'tiny', messages, response_format: format, max_tokens: 3 }
  const [{ finish_reason: end, message }] = (await openai.chat.completions.create(cut)).choices
  expect(end).toBe('length')
  expect(message.content).toMatch(/^\{\s?"/)
  expect(dispose()).toBe(0)
})

const allowed = (mode: 'auto' | 'required', ...names: string[]) => ({
  type: 'allowed_tools' as const,
  allowed_tools: { mode, tools: names.map(name => ({ type: 'function', function: { name } })) },
})

describe('tools', () => {
  test.each<[string, Partial<ChatCompletionCreateParams>, RegExp]>([
    ['a named one', { tool_choice: { type: 'function', function: { name: 'look_up' } } }, /^look_up$/],
    ['any of them', { tool_choice: 'required' }, /^(look_up|look|stop)$/],
    ['the only one', { tools: [tools[1]], tool_choice: 'required' }, /^look$/],
    ['one of the allowed ones', { tool_choice: allowed('required', 'stop', 'look') }, /^(look|stop)$/],
  ])('are called if required: %s', async (_, ask, names) => {
    const { app, dispose } = modelServer({ chatTemplate: plain }, { context: 1200 })
    const openai = await client(app)
    let ended = 0
    for (let seed = 0; seed < 3; seed++) {
      const choices = await createBoth(openai, { tools, seed, max_tokens: 110, ...(ask as object) })
      for (const { message, finish_reason: end } of choices) {
        if (end === 'length') continue
        ended++
        expect(end).toBe('tool_calls')
        expect(message.content).toBe(null)
        const [call] = message.tool_calls ?? []
        if (call?.type !== 'function') throw new Error('no call')
        expect(call.id).toMatch(/^call_\w+$/)
        expect(call.function.name).toMatch(names)
        const own = tools.find(tool => tool.type === 'function' && tool.function.name === call.function.name)
        const parameters = own?.type === 'function' ? own.function.parameters : undefined
        const validate = ajv.compile(parameters ?? { type: 'object', maxProperties: 0 })
        if (call.function.arguments.includes('\ufffd')) continue
        expect(validate(JSON.parse(call.function.arguments)), call.function.arguments).toBe(true)
      }
    }
    expect(ended).toBeGreaterThan(0)
    expect(dispose()).toBe(0)
  })

  const formats: Array<[string, string, string, string[]]> = [
    [
      'as Hermes',
      plainChatTemplate,
      'I look.\n<tool_call>\n{"name": "look_up", "arguments": {"year": 1865}}\n</tool_call>\n<tool_call>{"name":"stop"}</tool_call>',
      ['{"year":1865}', '{}'],
    ],
    [
      'as DeepSeek-V3',
      '{{ tools }}<｜tool▁calls▁begin｜>```json{{ tool_calls }}{% for m in messages %}{{ m.content }}{% endfor %}',
      'I look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n{"year": 1865}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
      ['{"year": 1865}', '{}'],
    ],
    [
      'as DeepSeek-V3.1',
      '{{ tools }}<｜tool▁calls▁begin｜>{{ tool_calls }}{% for m in messages %}{{ m.content }}{% endfor %}',
      'I look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look_up<｜tool▁sep｜>{"year": 1865}<｜tool▁call▁end｜><｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
      ['{"year": 1865}', '{}'],
    ],
    [
      'as Kimi K2',
      '{{ tools }}<|tool_calls_section_begin|>{{ tool_calls }}{% for m in messages %}{{ m.content }}{% endfor %}',
      'I look.\n<|tool_calls_section_begin|><|tool_call_begin|>functions.look_up:0<|tool_call_argument_begin|>{"year": 1865}<|tool_call_end|><|tool_call_begin|>functions.stop:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>',
      ['{"year": 1865}', '{}'],
    ],
    [
      'as GLM-4.6',
      '{{ tools }}<arg_key>{{ tool_calls }}{% for m in messages %}{{ m.content }}{% endfor %}',
      'I look.\n<tool_call>look_up\n<arg_key>year</arg_key>\n<arg_value>1865</arg_value>\n</tool_call>\n<tool_call>stop\n</tool_call>',
      ['{"year":1865}', '{}'],
    ],
    [
      'as GLM-4.7',
      '{{ tools }}<arg_key>{{ tool_calls }}{% for m in messages %}{{ m.content }}{% endfor %}',
      'I look.\n<tool_call>look_up<arg_key>year</arg_key><arg_value>1865</arg_value></tool_call><tool_call>stop</tool_call>',
      ['{"year":1865}', '{}'],
    ],
  ]
  describe.each(formats)('in the format of %s', (_, template, text, json) => {
    const scripted = async (parts: readonly string[]) => {
      const from = await ChatTemplate.from({ chat_template: template, eos_token: '<|end|>' })
      const server = scriptedServer(
        async function* (_, stats) {
          stats.finishReason = 'stop'
          yield* parts
        },
        { chatTemplate: from },
        4096,
      )
      return { openai: await client(server.app), ...server }
    }
    const split = (text: string, at: Random) => {
      const parts: string[] = []
      for (let rest = text; rest !== ''; ) {
        const length = 1 + at.integer(7)
        parts.push(rest.slice(0, length))
        rest = rest.slice(length)
      }
      return parts
    }

    test('are parsed, wherever the parts of the text end', async () => {
      for (let seed = 0; seed < 5; seed++) {
        const { openai } = await scripted(split(text, new Random(seed)))
        const [{ message, finish_reason: end }] = await createBoth(openai, { tools })
        expect(end).toBe('tool_calls')
        expect(message.content).toBe('I look.\n')
        expect(message.tool_calls?.map(call => call.type === 'function' && call.function)).toEqual([
          { name: 'look_up', arguments: json[0] },
          { name: 'stop', arguments: json[1] },
        ])
        const [one] = await createBoth(openai, { tools, parallel_tool_calls: false })
        expect(one.message.tool_calls).toHaveLength(1)
      }
    })

    test('are reported one after the other by the stream helper of the client', async () => {
      const { openai } = await scripted(split(text, new Random(9)))
      const events: string[] = []
      const stream = openai.chat.completions.stream({ model: 'tiny', messages, tools })
      stream.on('tool_calls.function.arguments.delta', ({ name }) => events.push(`${name} delta`))
      stream.on('tool_calls.function.arguments.done', ({ name }) => events.push(`${name} done`))
      await stream.done()
      expect(events).toEqual(['look_up delta', 'look_up done', 'stop delta', 'stop done'])
    })

    test('are left as text if the call is invalid, or if the request has no tools', async () => {
      for (const other of [
        'no <tool',
        'a <tool_call> is no call',
        '<｜tool▁calls▁begin｜>what',
        '<|tool_calls',
        text.slice(0, 12),
      ]) {
        const { openai } = await scripted(split(other, new Random(1)))
        const [{ message, finish_reason: end }] = await createBoth(openai, { tools })
        expect([message.content, end, message.tool_calls]).toEqual([other, 'stop', undefined])
      }
      const { openai, engine } = await scripted(split(text, new Random(1)))
      for (const ask of [{}, { tools, tool_choice: 'none' as const }]) {
        const [{ message }] = await createBoth(openai, ask)
        expect(message.content).toBe(text)
      }
      expect(tokenizer.decode(engine.calls[3].ids)).not.toContain('look_up')
    })
  })

  test('are passed to the template, with calls and results', async () => {
    const { app, engine } = scriptedServer(async function* () {}, { chatTemplate: plain }, 4096)
    const openai = await client(app)
    const call = { id: 'call_1', type: 'function' as const, function: { name: 'look_up', arguments: '{"year": 1865}' } }
    await openai.chat.completions.create({
      model: 'tiny',
      tools: [tools[2]],
      messages: [
        ...messages,
        { role: 'assistant', content: null, tool_calls: [call] },
        { role: 'tool', tool_call_id: 'call_1', content: 'with malice toward none' },
      ],
    })
    expect(tokenizer.decode(engine.calls[0].ids)).toBe(
      [
        '<|begin|>To call a tool, write <tool_call>, {"name": its name, "arguments": its arguments} and </tool_call>. Tools:',
        '{"name": "stop"}\n',
        'User: the better angels\n',
        'Assistant:<tool_call>\n{"name": "look_up", "arguments": {"year": 1865}}\n</tool_call><|end|>Tool: with malice toward none\n',
        'Assistant:',
      ].join('\n'),
    )
  })

  test('are rejected if the template or the request does not support them', async () => {
    const { app, dispose } = modelServer({ chatTemplate: plain })
    const openai = await client(app)
    const withoutTools = await client(modelServer({ chatTemplate }).app)
    const ask = (from: OpenAI, body: object) => from.chat.completions.create({ model: 'tiny', messages, ...body })
    const expectRejection = async (asking: Promise<unknown>, message: string) => {
      await expect(asking).rejects.toThrow(BadRequestError)
      await expect(asking).rejects.toThrow(message)
    }
    await expectRejection(ask(withoutTools, { tools }), 'chat template does not support tools')
    const result = { role: 'tool', tool_call_id: 'a', content: 'the' }
    await expectRejection(ask(withoutTools, { messages: [...messages, result] }), 'does not support tool calls')
    await expectRejection(ask(openai, { tool_choice: 'required' }), 'tool_choice requires tools')
    const other = { type: 'function', function: { name: 'other' } }
    await expectRejection(ask(openai, { tools, tool_choice: other }), 'no tool is named "other"')
    for (const mode of ['auto', 'required'] as const)
      await expectRejection(ask(openai, { tools, tool_choice: allowed(mode, 'look', 'other') }), 'is named "other"')
    await expectRejection(ask(openai, { tools, tool_choice: allowed('auto') }), 'tool_choice')
    const strange = [{ type: 'function', function: { name: 'f', parameters: { not: {} } } }]
    await expectRejection(
      ask(openai, { tools: strange, tool_choice: 'required' }),
      'tools[0].function.parameters: not is not supported',
    )
    dispose()
  })
})
