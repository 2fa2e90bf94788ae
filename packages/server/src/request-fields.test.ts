/** @file Every field that clients send is supported, ignored because it has no influence on the answer, or rejected with a reason. */
import { readFileSync } from 'node:fs'
import { ChatTemplate } from '@moe/tokenizer-bpe/data'
import { describe, expect, test } from 'vitest'
import { modelServer, post, scriptedServer, tokenizer } from './test-server.ts'

const validBodies = {
  '/v1/completions': { prompt: 'the people', max_tokens: 2 },
  '/v1/chat/completions': { messages: [{ role: 'user', content: 'the' }], max_tokens: 2 },
  '/v1/responses': { input: 'the', max_output_tokens: 2 },
}
type Path = keyof typeof validBodies
const paths = Object.keys(validBodies) as Path[]

/** A server that generates `text`. */
const serverThatGenerates = (text: string, options = {}) =>
  scriptedServer(async function* (_, stats) {
    stats.finishReason = 'stop'
    yield text
  }, options)

async function rejection(app: ReturnType<typeof serverThatGenerates>['app'], path: Path, fields: object) {
  const response = await app.request(path, post({ ...validBodies[path], ...fields }))
  const { error } = (await response.json()) as { error?: { message: string; param: string; code: string | null } }
  return { status: response.status, ...error }
}

/** A response of any endpoint. */
interface Answer {
  readonly choices?: ReadonlyArray<{ readonly text?: string; readonly message?: { readonly content: string } }>
  readonly output?: ReadonlyArray<{ readonly content: ReadonlyArray<{ readonly text: string }> }>
}

function answerText({ choices, output }: Answer): string | undefined {
  return choices ? (choices[0].text ?? choices[0].message?.content) : output?.[0].content[0].text
}

/** The fields that a type of OpenAI's client library declares. */
function declaredFields(file: string, type: string): string[] {
  const source = readFileSync(new URL(`../node_modules/openai/resources/${file}.d.ts`, import.meta.url), 'utf8')
  const [, body = ''] = new RegExp(`export interface ${type} \\{\n([\\s\\S]*?)\n\\}`).exec(source) ?? []
  return Array.from(body.matchAll(/^ {4}(\w+)\??:/gm), ([, name]) => name)
}

const declared = {
  '/v1/completions': declaredFields('completions', 'CompletionCreateParamsBase'),
  '/v1/chat/completions': declaredFields('chat/completions/completions', 'ChatCompletionCreateParamsBase'),
  '/v1/responses': declaredFields('responses/responses', 'ResponseCreateParamsBase'),
}

describe.each(paths)('%s', path => {
  test('knows every field of OpenAI’s API', async () => {
    const { app } = serverThatGenerates('so')
    expect(declared[path].length).toBeGreaterThan(15)
    for (const name of declared[path]) {
      const nothing = await rejection(app, path, { [name]: null })
      if (name in validBodies[path] === false) expect(nothing.status, name).toBe(200)
      // No field allows this value.
      const { code } = await rejection(app, path, { [name]: Number.MIN_VALUE })
      expect(code, name).not.toBe('unknown_parameter')
    }
  })

  test('ignores fields that have no influence on the answer', async () => {
    const { app, engine } = serverThatGenerates('so')
    await app.request(path, post({ ...validBodies[path], seed: 1 }))
    for (const fields of [
      { user: 'a', safety_identifier: 'b', metadata: { topic: 'c' } },
      { service_tier: 'flex', prediction: { type: 'content', content: 'so' }, max_tool_calls: 3 },
      { prompt_cache_key: 'a', prompt_cache_retention: '24h', prompt_cache_options: { mode: 'explicit' } },
    ]) {
      expect(await rejection(app, path, { ...fields, seed: 1 })).toMatchObject({ status: 200 })
      const { options, ids } = engine.calls[engine.calls.length - 1]
      expect({ ...options, signal: null }).toEqual({ ...engine.calls[0].options, signal: null })
      expect(ids).toEqual(engine.calls[0].ids)
    }
  })

  test('rejects unknown fields, and suggests the intended name', async () => {
    const { app } = serverThatGenerates('so')
    const unknown = { status: 400, code: 'unknown_parameter' }
    for (const [name, message] of [
      ['temprature', 'unknown field "temprature": did you mean temperature?'],
      ['topP', 'unknown field "topP": did you mean top_p?'],
      ['mirostat', 'unknown field "mirostat": omit it'],
      ['toString', 'unknown field "toString": omit it'],
    ])
      expect(await rejection(app, path, { [name]: 1 })).toMatchObject({ ...unknown, param: name, message })
    const long = await rejection(app, path, { ['x'.repeat(1e6)]: 1 })
    expect(long).toMatchObject({ ...unknown, message: `unknown field "${'x'.repeat(100)}": omit it` })
    const proto = await app.request(path, post(JSON.stringify(validBodies[path]).replace('{', '{"__proto__":{"a":1},')))
    expect(proto.status).toBe(400)
    expect(await rejection(app, path, { mirostat: null })).toMatchObject({ status: 200 })
    expect(await rejection(app, path, { stream: true, stream_options: { include_use: true } })).toMatchObject({
      status: 400,
      param: 'stream_options',
    })
  })

  test('passes sampling parameters to the engine', async () => {
    const { app, engine } = serverThatGenerates('so')
    const defaults = { temperature: 1, topP: 1, stop: [] }
    const others = ['topK', 'minP', 'repetitionPenalty', 'frequencyPenalty', 'presencePenalty', 'logitBias'] as const
    for (const [fields, expected] of [
      [{}, {}],
      [{ temperature: null, top_p: null, top_k: null, min_p: null, repetition_penalty: null, seed: null }, {}],
      [
        { temperature: 0, top_p: 0.5, min_p: 0.25 },
        { temperature: 0, topP: 0.5, minP: 0.25 },
      ],
      [{ top_k: 0 }, {}],
      [{ top_k: -1 }, {}],
      [
        { top_k: 1, repetition_penalty: 1.5 },
        { topK: 1, repetitionPenalty: 1.5 },
      ],
      [
        { frequency_penalty: -2, presence_penalty: 2 },
        { frequencyPenalty: -2, presencePenalty: 2 },
      ],
      // 0 selects the most likely token.
      [{ top_p: 0 }, { topP: Number.EPSILON }],
      [{ seed: 7 }, { seed: 7 }],
      [{ seed: 2 ** 60 + 2 ** 20 }, { seed: 2 ** 20 }],
      [{ stop: 'so' }, { stop: ['so'] }],
      [{ stop: ['so', 'it'] }, { stop: ['so', 'it'] }],
      [{ stop: null }, {}],
    ] as const) {
      expect(await rejection(app, path, fields)).toMatchObject({ status: 200 })
      const { options } = engine.calls[engine.calls.length - 1]
      expect(options, JSON.stringify(fields)).toMatchObject({ ...defaults, ...expected })
      for (const name of others) if (!(name in expected)) expect(options[name], name).toBeUndefined()
    }
    if (path === '/v1/responses') return
    const before = engine.calls.length
    expect(await rejection(app, path, { n: 3, seed: 7 })).toMatchObject({ status: 200 })
    expect(engine.calls.slice(before).map(({ options }) => options.seed)).toEqual([7, 8, 9])
  })

  test('samples with penalties and logit bias as the model does', async () => {
    const { app, model, dispose } = modelServer()
    const body = { ...validBodies[path], max_tokens: undefined, max_output_tokens: undefined, seed: 3 }
    const length = path === '/v1/responses' ? 'max_output_tokens' : 'max_tokens'
    const text = {
      '/v1/completions': 'the people',
      '/v1/chat/completions': '<|begin|><|user|>user: the<|assistant|>',
      '/v1/responses': '<|begin|><|user|>user: the<|assistant|>',
    }[path]
    const answers = new Set<string>()
    for (const [fields, options] of [
      [{}, {}],
      [{ frequency_penalty: 2 }, { frequencyPenalty: 2 }],
      [{ presence_penalty: -2 }, { presencePenalty: -2 }],
      [{ logit_bias: { 70: 100, 71: 99.5 } }, { logitBias: { 70: 100, 71: 99.5 } }],
    ] as const) {
      const sampled = { maxTokens: 24, temperature: 1, seed: 3, ...options, tokenizer }
      let expected = ''
      for await (const part of model.generate(tokenizer.encode(text), sampled)) expected += part
      const response = await app.request(path, post({ ...body, [length]: 24, ...fields }))
      const answer = answerText((await response.json()) as Answer)
      expect(answer).toBe(expected)
      answers.add(expected)
    }
    expect(answers.size).toBe(4)
    expect(dispose()).toBe(0)
  })

  test('rejects penalties and biases that are out of range', async () => {
    const { app } = serverThatGenerates('so')
    for (const name of ['frequency_penalty', 'presence_penalty'])
      for (const value of [2.1, -2.1, '1', [1]])
        expect(await rejection(app, path, { [name]: value })).toMatchObject({ status: 400, param: name })
    const outOfRange = [{ 1: 101 }, { 1: -101 }, { 1: '1' }, { a: 1 }, { '-1': 1 }, { 1.5: 1 }, { 290: 1 }, [1], 5]
    for (const value of [...outOfRange, { 99999999999999999999: 1 }, { 7: 1, '007': 2 }]) {
      const { status, param } = await rejection(app, path, { logit_bias: value })
      expect([status, param?.split('.')[0]], JSON.stringify(value)).toEqual([400, 'logit_bias'])
    }
  })
})

test.each<[Path, object, string, string]>([
  ['/v1/completions', { max_completion_tokens: 5 }, 'max_completion_tokens', 'is called max_tokens here'],
  ['/v1/completions', { max_output_tokens: 5 }, 'max_output_tokens', 'is called max_tokens here'],
  ['/v1/completions', { messages: [] }, 'messages', 'use /v1/chat/completions'],
  ['/v1/completions', { best_of: 3, n: 2 }, 'best_of', 'use n'],
  ['/v1/completions', { suffix: 'end' }, 'suffix', 'has no <｜fim▁begin｜>'],
  ['/v1/chat/completions', { suffix: 'end' }, 'suffix', 'use /v1/completions'],
  ['/v1/completions', { reasoning_effort: 'low' }, 'reasoning_effort', 'use /v1/chat/completions'],
  ['/v1/completions', { parallel_tool_calls: 1 }, 'parallel_tool_calls', 'is not supported here'],
  ['/v1/completions', { stream_options: { include_usage: true } }, 'stream_options', 'requires stream: true'],
  ['/v1/chat/completions', { max_output_tokens: 5 }, 'max_output_tokens', 'is called max_completion_tokens here'],
  ['/v1/chat/completions', { max_completion_tokens: 5 }, 'max_tokens', 'send one of them'],
  ['/v1/chat/completions', { prompt: 'the' }, 'prompt', 'is called messages here'],
  ['/v1/chat/completions', { store: true }, 'store', 'this server stores nothing'],
  ['/v1/chat/completions', { verbosity: 'low' }, 'verbosity', 'ask for a short or long answer in a message'],
  ['/v1/chat/completions', { reasoning_effort: 'low' }, 'reasoning_effort', 'does not read it'],
  ['/v1/chat/completions', { functions: [{ name: 'f' }] }, 'functions', 'use tools and tool_choice'],
  ['/v1/chat/completions', { modalities: ['text', 'audio'] }, 'modalities', 'generates only text'],
  ['/v1/chat/completions', { web_search_options: {} }, 'web_search_options', 'runs no tools'],
  ['/v1/chat/completions', { top_logprobs: 2 }, 'top_logprobs', 'requires logprobs'],
  ['/v1/chat/completions', { thinking: { type: 'enabled' } }, 'thinking', 'use chat_template_kwargs'],
  [
    '/v1/chat/completions',
    { messages: [{ role: 'assistant', content: 'so', prefix: true }] },
    'messages[0].prefix',
    'use /v1/completions',
  ],
  [
    '/v1/chat/completions',
    { stream: true, stream_options: { include_obfuscation: true } },
    'stream_options.include_obfuscation',
    'is not supported',
  ],
  ['/v1/responses', { n: 2 }, 'n', 'send several requests'],
  ['/v1/responses', { max_tokens: 5 }, 'max_tokens', 'is called max_output_tokens here'],
  ['/v1/responses', { max_completion_tokens: 5 }, 'max_completion_tokens', 'is called max_output_tokens here'],
  ['/v1/responses', { messages: [] }, 'messages', 'is called input here'],
  ['/v1/responses', { response_format: { type: 'text' } }, 'response_format', 'is called text.format here'],
  ['/v1/responses', { reasoning_effort: 'low' }, 'reasoning_effort', 'is called reasoning.effort here'],
  ['/v1/responses', { reasoning: { effort: 'low' } }, 'reasoning.effort', 'reasoning.effort: this model'],
  ['/v1/responses', { reasoning: { mode: 'pro' } }, 'reasoning', 'mode'],
  ['/v1/responses', { text: { verbosity: 'low' } }, 'text.verbosity', 'in the instructions'],
  ['/v1/responses', { top_logprobs: 2 }, 'top_logprobs', 'requires include: ["message.output_text.logprobs"]'],
  ['/v1/responses', { logprobs: true }, 'logprobs', 'is called include: ["message.output_text.logprobs"] here'],
  ['/v1/responses', { include: ['everything'] }, 'include[0]', ''],
  ['/v1/responses', { context_management: [{ type: 'compaction' }] }, 'context_management', 'shorten the conversation'],
])('%s rejects %j', async (path, fields, param, message) => {
  const { app, engine } = serverThatGenerates('so')
  expect(await rejection(app, path, fields)).toMatchObject({
    status: 400,
    param,
    message: expect.stringContaining(message),
  })
  expect(engine.calls).toHaveLength(0)
})

test.each<[Path, object]>([
  ['/v1/completions', { best_of: 2, n: 2 }],
  ['/v1/completions', { best_of: 1, suffix: '', tools: [], tool_choice: 'none' }],
  ['/v1/chat/completions', { max_completion_tokens: 2, store: false, modalities: ['text'], verbosity: 'medium' }],
  ['/v1/chat/completions', { functions: [], function_call: 'none', top_logprobs: 0, parallel_tool_calls: true }],
  ['/v1/responses', { n: 1, store: false, background: false, truncation: 'disabled', context_management: [] }],
  ['/v1/responses', { text: { verbosity: 'medium' }, reasoning: { summary: 'auto', effort: null }, top_logprobs: 0 }],
  [
    '/v1/responses',
    { include: ['reasoning.encrypted_content'], stream: true, stream_options: { include_usage: true } },
  ],
])('%s accepts %j, which has no effect', async (path, fields) => {
  const { app } = serverThatGenerates('so')
  const response = await app.request(path, post({ ...validBodies[path], ...fields }))
  expect(response.status).toBe(200)
  expect(await response.text()).toContain('so')
})

describe('the chat template', () => {
  test('reads the reasoning effort', async () => {
    const chatTemplate = await ChatTemplate.from({
      chat_template: '{{ reasoning_effort or "none" }}{{ messages[0].content }}',
    })
    const { app, engine } = serverThatGenerates('so', { chatTemplate })
    for (const [path, fields, prompt] of [
      ['/v1/chat/completions', {}, 'nonethe'],
      ['/v1/chat/completions', { reasoning_effort: 'high' }, 'highthe'],
      ['/v1/responses', { reasoning: { effort: 'low' } }, 'lowthe'],
    ] as const) {
      expect(await rejection(app, path, fields)).toMatchObject({ status: 200 })
      expect(tokenizer.decode(engine.calls[engine.calls.length - 1].ids)).toBe(prompt)
    }
  })

  test('reads the names of participants', async () => {
    const chatTemplate = await ChatTemplate.from({
      chat_template: '{% for m in messages %}{{ m.name or m.role }}: {{ m.content }};{% endfor %}',
    })
    const { app, engine } = serverThatGenerates('so', { chatTemplate })
    const messages = [
      { role: 'user', name: 'abe', content: 'the' },
      { role: 'assistant', name: null, content: 'people' },
    ]
    expect(await rejection(app, '/v1/chat/completions', { messages })).toMatchObject({ status: 200 })
    expect(tokenizer.decode(engine.calls[0].ids)).toBe('abe: the;assistant: people;')
  })
})
