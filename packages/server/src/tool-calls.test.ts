/** @file Differences between models with tool calls: ids, types of arguments, reasoning, and descriptions of tools in the prompt. */
import { Random } from '@moe/core'
import { trainBpe } from '@moe/tokenizer-bpe'
import { ChatTemplate } from '@moe/tokenizer-bpe/data'
import { Ajv2020 } from 'ajv/dist/2020.js'
import type { ChatCompletion } from 'openai/resources'
import { describe, expect, test } from 'vitest'
import { modelServer, post, scriptedServer, tokenizer } from './test-server.ts'
import { toolFormatOf } from './tool-format.ts'

const ask = async (app: Pick<ReturnType<typeof modelServer>['app'], 'request'>, body: object) => {
  const request = { messages: [{ role: 'user', content: 'the better angels' }], ...body }
  const response = await app.request('/v1/chat/completions', post(request))
  const answer = (await response.json()) as ChatCompletion & { error?: { message: string; param: string } }
  return { status: response.status, error: answer.error, ...answer.choices?.[0] }
}

/** A template that renders one message per line, then `end`. */
const template = async (marks: string, end = '') =>
  ChatTemplate.from({
    chat_template: `{# ${marks} #}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.reasoning_content or '' }}{% for call in m.tool_calls or [] %} {{ call.id }}{% endfor %}{{ '\\n' }}{% endfor %}{{ note or '' }}${end}`,
  })

/** A server whose model generates `text`, and the last prompt that it received. */
async function serverThatGenerates(text: string, chatTemplate: ChatTemplate) {
  const script = async function* (_: unknown, stats: { finishReason: string | null }) {
    stats.finishReason = 'stop'
    yield text
  }
  const { app, engine } = scriptedServer(script as Parameters<typeof scriptedServer>[0], { chatTemplate }, 4096)
  return { app, prompt: () => tokenizer.decode(engine.calls[engine.calls.length - 1].ids) }
}

const tools = ['look_up', 'stop'].map(name => ({
  type: 'function' as const,
  function: {
    name,
    description: 'an address',
    parameters: {
      type: 'object',
      properties: { year: { type: 'integer' }, who: { type: 'string' }, all: { type: ['string', 'null'] }, any: {} },
    },
  },
}))

describe('GLM', () => {
  const { parse } = toolFormatOf('<arg_key>')
  const pair = (key: string, value: string) => `<arg_key>${key}</arg_key>\n<arg_value>${value}</arg_value>\n`
  const isText = (name: string, key: string) => name === 'look_up' && key === 'who'

  test('arguments are strings if their schema has type string, or if they are not JSON', () => {
    const values = [pair('year', '1865'), pair('who', '16'), pair('all', '[true, null]'), pair('any', 'A. "Abe" L.')]
    const [call] = parse(`<tool_call>look_up\n${values.join('')}</tool_call>`, isText)
    expect(call.name).toBe('look_up')
    expect(JSON.parse(call.arguments)).toEqual({ year: 1865, who: '16', all: [true, null], any: 'A. "Abe" L.' })
    const [other] = parse(`<tool_call>stop${pair('who', '16')}`, isText)
    expect(JSON.parse(other.arguments)).toEqual({ who: 16 })
  })

  test.each([
    '<tool_call>',
    '<tool_call>\n{"name": "look_up"}</tool_call>',
    '<tool_call>look up</tool_call>',
    '<tool_call>look_up</tool_call><tool_call>look up</tool_call>',
  ])('%j is not parsed as a call', text => expect(parse(text, isText)).toEqual([]))

  test('the server recognizes string arguments', async () => {
    const text = `<tool_call>look_up\n${pair('who', '16')}${pair('all', '17')}${pair('year', '18')}</tool_call>`
    const { app } = await serverThatGenerates(text, await template('tools <arg_key>'))
    const { message } = await ask(app, { tools })
    const [call] = message.tool_calls ?? []
    expect(call.type === 'function' && JSON.parse(call.function.arguments)).toEqual({ who: '16', all: '17', year: 18 })
  })

  test('a forced call continues after its name', async () => {
    const glm = await template('tools <arg_key>')
    const { app, prompt } = await serverThatGenerates(`\n${pair('year', '1865')}</tool_call>`, glm)
    const named = { type: 'function', function: { name: 'look_up' } }
    const { message, finish_reason: end } = await ask(app, { tools, tool_choice: named })
    expect(prompt()).toMatch(/\n<tool_call>look_up$/)
    expect([end, message.tool_calls]).toMatchObject([
      'tool_calls',
      [{ function: { name: 'look_up', arguments: '{"year":1865}' } }],
    ])
  })
})

describe('Kimi', () => {
  const mark = '<|tool_calls_section_begin|>'
  const callWithId = (id: string) => `${mark}<|tool_call_begin|>${id}<|tool_call_argument_begin|>{}<|tool_call_end|>`

  test('calls keep the ids that the model writes', async () => {
    const { app, prompt } = await serverThatGenerates(
      callWithId('functions.look_up:3'),
      await template(`tools tool_calls ${mark}`),
    )
    const { message } = await ask(app, { tools })
    expect(message.tool_calls).toMatchObject([{ id: 'functions.look_up:3', function: { name: 'look_up' } }])
    const messages = [{ role: 'user', content: 'a' }, message, { role: 'tool', tool_call_id: 'a', content: 'b' }]
    await ask(app, { messages })
    expect(prompt()).toContain('assistant:  functions.look_up:3\n')
    // The id of a forced call is the one that the model would have generated.
    await ask(app, { messages, tools, tool_choice: { type: 'function', function: { name: 'stop' } } })
    expect(prompt()).toMatch(/functions\.stop:1<\|tool_call_argument_begin\|>$/)
  })

  test('a call without a name is not parsed', () => {
    expect(toolFormatOf(mark).parse(callWithId('what'), () => false)).toEqual([])
  })
})

describe('DeepSeek', () => {
  const mark = '<｜tool▁calls▁begin｜>'

  test.each([
    ['tool_calls', 'tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>'],
    [
      'tool_calls ```json',
      'function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```<｜tool▁call▁end｜>',
    ],
  ])('gets a description of tools in the system message if the template has none: %s', async (marks, format) => {
    const { app, prompt } = await serverThatGenerates('', await template(`${mark} ${marks}`))
    const [system, user] = [
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: 'the better angels' },
    ]
    await ask(app, { tools: tools.slice(0, 1), messages: [system, user] })
    const description = prompt()
    expect(description).toMatch(
      /^system: Be brief\.\n\n## Tools\nYou have access to the following tools:\n\n### look_up\n/,
    )
    expect(description).toContain(`\n\nParameters: ${JSON.stringify(tools[0].function.parameters)}\n\nIMPORTANT`)
    expect(description).toContain(`${mark}<｜tool▁call▁begin｜>${format}{additional_tool_calls}<｜tool▁calls▁end｜>\n`)
    expect(description).toMatch(/\nuser: the better angels\n$/)
    // Calls in the described format are parsed.
    const call = format.replace('tool_call_name', 'stop').replace('tool_call_arguments', '{"a": 1}')
    const calling = await serverThatGenerates(`${mark}<｜tool▁call▁begin｜>${call}`, await template(`${mark} ${marks}`))
    const { message } = await ask(calling.app, { tools })
    expect(message.tool_calls).toMatchObject([{ function: { name: 'stop', arguments: '{"a": 1}' } }])
    await ask(app, { tools, tool_choice: 'none' })
    expect(prompt()).not.toContain('## Tools')
    const allowed = { mode: 'auto', tools: [{ type: 'function', function: { name: 'stop' } }] }
    await ask(app, { tools, tool_choice: { type: 'allowed_tools', allowed_tools: allowed } })
    expect(prompt().match(/(?<=^### ).+/gm)).toEqual(['stop'])
  })
})

test.each([
  // The format, the beginning of a text, and what it repeats.
  ['<arg_key>', '<tool_call>a', '<arg_key>'],
  ['<arg_key>', '<tool_call>a', '<arg_key>a</arg_key><arg_value>'],
  ['<｜tool▁calls▁begin｜>', '<｜tool▁calls▁begin｜>', '<｜tool▁call▁begin｜>'],
  ['<｜tool▁calls▁begin｜> ```json', '<｜tool▁calls▁begin｜>', '<｜tool▁call▁begin｜>function<｜tool▁sep｜>'],
  ['tool_declare', '<|tool_call_begin|>functions.a:0<|tool_call_argument_begin|>{', ' '],
])('a text that repeats a marker endlessly does not block the server: %s %s %j', (source, begin, repeated) => {
  // Takes minutes if the time is quadratic.
  const calls = toolFormatOf(source).parse(`${begin}${repeated.repeat(300_000)}}`, () => false)
  expect(calls.length).toBeLessThan(2)
})

describe('response_format together with tools', () => {
  const schema = { type: 'object', properties: { year: { type: 'integer' } }, required: ['year'] }
  const format = { type: 'json_schema', json_schema: { name: 'year', schema } }
  const validate = new Ajv2020().compile(schema)
  const toolsAndFormat = { tools, response_format: format }

  test('the answer matches the format or starts with a call', async () => {
    const plain = await template('tools tool_calls')
    const { app, dispose } = modelServer({ chatTemplate: plain }, { context: 400 })
    const seen = { json: 0, call: 0 }
    for (let seed = 0; seed < 12; seed++) {
      const { message, finish_reason: end } = await ask(app, {
        ...toolsAndFormat,
        seed,
        temperature: 2,
        max_tokens: 40,
      })
      const { content } = message
      if (content?.startsWith('<tool_call>')) seen.call++
      else if (end === 'stop' && content !== null) {
        seen.json++
        expect(validate(JSON.parse(content)), content).toBe(true)
      } else expect(content).toMatch(/^(<|\{)/)
    }
    expect(Math.min(seen.json, seen.call), JSON.stringify(seen)).toBeGreaterThan(0)
    expect(dispose()).toBe(0)
  })

  test('calls are parsed, but not their markers inside an answer', async () => {
    const plain = await template('tools tool_calls')
    const call = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    const calling = await ask((await serverThatGenerates(call, plain)).app, toolsAndFormat)
    expect(calling.message).toMatchObject({ content: null, tool_calls: [{ function: { name: 'stop' } }] })
    for (const text of [`{"a": "${call.replaceAll('"', '')}"}`, '{}', ` ${call}`]) {
      const { message, finish_reason: end } = await ask((await serverThatGenerates(text, plain)).app, toolsAndFormat)
      expect([message.content, message.tool_calls, end]).toEqual([text, undefined, 'stop'])
    }
  })
})

describe('reasoning', () => {
  const split = (text: string, random: Random) => {
    const parts: string[] = []
    for (let rest = text; rest !== ''; ) {
      const length = 1 + random.integer(6)
      parts.push(rest.slice(0, length))
      rest = rest.slice(length)
    }
    return parts
  }

  /** The parsed message of a generated text, which must be the same when streamed in random parts. */
  async function parsedMessage(text: string, end: string, seed: number, body: object = {}) {
    const parts = split(text, new Random(seed))
    const chatTemplate = await template('tools tool_calls </think>', end)
    const script: Parameters<typeof scriptedServer>[0] = async function* (_, stats) {
      stats.finishReason = 'stop'
      yield* parts
    }
    const { app } = scriptedServer(script, { chatTemplate }, 4096)
    const { message } = await ask(app, body)
    const { content, tool_calls: calls } = message
    const whole = { content, reasoning: (message as { reasoning_content?: string }).reasoning_content, calls }
    const asked = { messages: [{ role: 'user', content: 'the' }], stream: true, ...body }
    const response = await app.request('/v1/chat/completions', post(asked))
    const streamed = { content: '', reasoning: '' }
    let isAnswer = false
    for (const line of (await response.text()).split('\n\n')) {
      if (!line.startsWith('data: {')) continue
      const { delta, logprobs } = JSON.parse(line.slice(6)).choices[0]
      expect(logprobs).toBe(null)
      if (delta.reasoning_content) expect(isAnswer).toBe(false)
      if (delta.content) isAnswer = true
      streamed.content += delta.content ?? ''
      streamed.reasoning += delta.reasoning_content ?? ''
    }
    expect(streamed).toEqual({ content: content ?? '', reasoning: whole.reasoning ?? '' })
    return whole
  }

  test.each<[string, string, string, string | undefined]>([
    // The end of the prompt, the generated text, its content and its reasoning.
    ['<think>', 'so it\n is.\n</think>\n\nYes </think>.', 'Yes </think>.', 'so it\n is.'],
    ['<think>\n', '\n</think>Yes', 'Yes', undefined],
    ['<think>', 'it is cut </thi', '', 'it is cut </thi'],
    ['<think>', 'a < b <', '', 'a < b <'],
    ['</think>', 'Yes <think>', 'Yes <think>', undefined],
    ['', '<think>\nhm \n</think>\n\nYes', 'Yes', 'hm'],
    ['', '\n<think></think>\nYes', 'Yes', undefined],
    ['', 'Yes, <think>no</think>', 'Yes, <think>no</think>', undefined],
    ['', '\n <thin', '\n <thin', undefined],
    ['', ' Yes', ' Yes', undefined],
    ['', '<think>hm', '', 'hm'],
    ['', '', '', undefined],
  ])(
    'after a prompt that ends with %j: the text %j has the content %j and the reasoning %j',
    async (end, text, content, reasoning) => {
      for (let seed = 0; seed < 6; seed++) expect(await parsedMessage(text, end, seed)).toEqual({ content, reasoning })
    },
  )

  test('comes before calls', async () => {
    const text = 'look\n</think>\n\nI look.<tool_call>{"name": "stop"}</tool_call>'
    const calls = [{ function: { name: 'stop', arguments: '{}' } }]
    for (let seed = 0; seed < 6; seed++)
      expect(await parsedMessage(text, '<think>', seed, { tools })).toMatchObject({
        content: 'I look.',
        reasoning: 'look',
        calls,
      })
  })

  test.each(['<think>', ''])('is not constrained if the answer is, with a prompt that ends with %j', async end => {
    const chatTemplate = await template('tools tool_calls </think>', end)
    const { app, dispose } = modelServer({ chatTemplate }, { context: 600 })
    const schema = { type: 'object', properties: { a: { type: 'boolean' } }, required: ['a'] }
    const form = { response_format: { type: 'json_schema', json_schema: { name: 'a', schema } } }
    let ended = 0
    for (let seed = 0; seed < 8; seed++) {
      const constraints = [form, { tools, tool_choice: 'required' }]
      const { message, finish_reason: reason } = await ask(app, {
        ...constraints[seed % 2],
        seed,
        temperature: 2,
        max_tokens: 60,
      })
      if (reason === 'length') continue
      ended++
      if (seed % 2 === 0) expect(JSON.parse(message.content as string)).toEqual({ a: expect.any(Boolean) })
      else expect(message.tool_calls).toHaveLength(1)
    }
    // Random reasoning that the prompt has started hardly ever ends.
    if (end === '') expect(ended).toBeGreaterThan(0)
    expect(dispose()).toBe(0)
  })

  test('is passed to the template with its message', async () => {
    const { app, prompt } = await serverThatGenerates('', await template('</think>'))
    const messages = [
      { role: 'user', content: 'a', reasoning_content: 'no' },
      { role: 'assistant', content: 'b', reasoning_content: ' why' },
      { role: 'user', content: 'c' },
    ]
    await ask(app, { messages })
    expect(prompt()).toBe('user: a\nassistant: b why\nuser: c\n')
  })
})

test('a previous call without arguments is passed to the template as an empty object', async () => {
  const chatTemplate = await ChatTemplate.from({
    chat_template:
      '{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}',
  })
  const { app, prompt } = await serverThatGenerates('', chatTemplate)
  const call = (json: string) => ({ id: 'a', type: 'function', function: { name: 'stop', arguments: json } })
  const messages = [{ role: 'assistant', tool_calls: ['{"a": 1}', '', ' '].map(call) }]
  expect((await ask(app, { messages })).status).toBe(200)
  expect(prompt()).toBe('{"a": 1}{}{}')
  const { status, error } = await ask(app, { messages: [{ role: 'assistant', tool_calls: [call('{')] }] })
  expect([status, error?.message]).toEqual([400, expect.stringContaining('the arguments of stop are not valid JSON')])
})

test('variables are passed to the template, except reserved ones', async () => {
  const { app, prompt } = await serverThatGenerates('', await template(''))
  await ask(app, { chat_template_kwargs: { note: 'briefly' } })
  expect(prompt()).toMatch(/\nbriefly$/)
  for (const name of ['messages', 'tools', 'add_generation_prompt', 'bos_token']) {
    const { status, error } = await ask(app, { chat_template_kwargs: { [name]: [] } })
    expect([status, error?.param]).toEqual([400, 'chat_template_kwargs'])
  }
  expect((await ask(app, { chat_template_kwargs: 'note' })).status).toBe(400)
})

test('calls and reasoning are extracted if their marks are special tokens, which are not part of other texts', async () => {
  const specialTokens = ['<tool_call>', '</tool_call>', '<think>', '</think>', '<other>']
  const own = trainBpe(['the better angels'], { vocabSize: 270, specialTokens, minFrequency: 1 })
  const text = '<think>so</think>I <other>look<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
  const { app } = scriptedServer(
    async function* ({ options }, stats) {
      stats.finishReason = 'stop'
      const stream = options.tokenizer.createDecodeStream({ skipSpecialTokens: true })
      for (const id of own.encode(text)) yield stream.push(id)
    },
    { tokenizer: own, chatTemplate: await template('tools tool_calls </think>') },
    4096,
  )
  const { message, finish_reason: end } = await ask(app, { tools })
  expect(message).toMatchObject({ content: 'I look', reasoning_content: 'so' })
  expect(message.tool_calls).toMatchObject([{ function: { name: 'stop', arguments: '{}' } }])
  expect(end).toBe('tool_calls')
  const { message: withoutTools } = await ask(app, {})
  expect(withoutTools.content).toBe('I look{"name": "stop", "arguments": {}}')
})
