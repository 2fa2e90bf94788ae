/** @file Tools with `strict: true` that the model may call: arguments match their schemas. */
import { Random } from '@moe/core'
import type { TokenConstraint } from '@moe/deepseek'
import { ChatTemplate, plainChatTemplate } from '@moe/tokenizer-bpe/data'
import { Ajv2020 } from 'ajv/dist/2020.js'
import type { ChatCompletion, ChatCompletionCreateParams } from 'openai/resources'
import { describe, expect, test } from 'vitest'
import { bytewise, post, scriptedServer, tokenizer } from './test-server.ts'

const end = tokenizer.tokenToId('<|end|>') as number

const schema = {
  type: 'object',
  properties: {
    kind: { enum: ['a "speech"', 'letter', null] },
    year: { type: 'integer', minimum: 1790, maximum: 2026 },
    words: { type: 'array', items: { type: 'string', maxLength: 4 }, maxItems: 2 },
  },
  required: ['kind', 'year', 'words'],
  additionalProperties: false,
}
const validate = new Ajv2020().compile(schema)
const tools = [
  { type: 'function' as const, function: { name: 'stop', parameters: { type: 'object', not: {} } } },
  { type: 'function' as const, function: { name: 'look_up', parameters: schema, strict: true } },
]

/** Writes a text under a constraint. */
class Writer {
  text = ''
  readonly #bytes: number[] = []
  readonly #constraint: TokenConstraint
  readonly #random: Random

  constructor(constraint: TokenConstraint | undefined, random: Random) {
    if (constraint === undefined) throw new Error('no constraint')
    this.#constraint = constraint
    this.#random = random
  }

  async allows(id: number): Promise<boolean> {
    return (await this.#allowed()).includes(id)
  }

  async write(text: string): Promise<void> {
    for (const id of bytewise(text)) await this.#take(id)
  }

  /** Writes random tokens, or as soon as allowed `preferred`, until the text ends with `ending`. */
  async writeRandomly(ending: string, preferred?: string): Promise<void> {
    const [first] = preferred === undefined ? [undefined] : bytewise(preferred)
    for (let i = 0; !this.text.endsWith(ending); i++) {
      if (i === 400) throw new Error(`no end: ${this.text}`)
      const ids = await this.#allowed()
      expect(ids).not.toContain(end)
      await this.#take(ids.find(id => id === first) ?? ids[this.#random.integer(ids.length)])
    }
  }

  async #allowed(): Promise<number[]> {
    const words = (await this.#constraint.allowed()) as Int32Array
    return Array.from({ length: tokenizer.vocabSize }, (_, id) => id).filter(id => (words[id >> 5] >>> (id & 31)) & 1)
  }

  async #take(id: number): Promise<void> {
    if (!(await this.allows(id))) throw new Error(`${this.text}: ${JSON.stringify(tokenizer.decode([id]))} is excluded`)
    this.#constraint.accept(id)
    this.#bytes.push(...tokenizer.tokenBytes(id))
    this.text = new TextDecoder().decode(Uint8Array.from(this.#bytes))
  }
}

/** A server whose model writes with `script`. */
async function serverThatWrites(template: string, script: (writer: Writer) => Promise<void>, seed = 0) {
  const chatTemplate = await ChatTemplate.from({ chat_template: template, eos_token: '<|end|>' })
  const { app } = scriptedServer(
    async function* ({ options }, stats) {
      const writer = new Writer(options.constraint, new Random(seed))
      await script(writer)
      stats.finishReason = 'stop'
      yield writer.text
    },
    { chatTemplate },
    4096,
  )
  return async (body: Partial<ChatCompletionCreateParams>) => {
    const messages = [{ role: 'user', content: 'the better angels' }]
    const response = await app.request('/v1/chat/completions', post({ messages, ...body }))
    const answer = (await response.json()) as ChatCompletion & { error?: { message: string; param: string } }
    return { status: response.status, error: answer.error, choice: answer.choices?.[0] }
  }
}

const template = (marks: string) => `{# ${marks} tools tool_calls #}{% for m in messages %}{{ m.content }}{% endfor %}`

/** Name, chat template, text before the first call, text before each call, text before the arguments, text after them. */
const formats = [
  ['Hermes', plainChatTemplate, '', '<tool_call>\n{"name": "', () => '", "arguments": ', '}\n</tool_call>'],
  [
    'DeepSeek-V3',
    template('<｜tool▁calls▁begin｜>```json'),
    '<｜tool▁calls▁begin｜>',
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>',
    () => '\n```json\n',
    '\n```<｜tool▁call▁end｜>',
  ],
  [
    'DeepSeek-V3.1',
    template('<｜tool▁calls▁begin｜>'),
    '<｜tool▁calls▁begin｜>',
    '<｜tool▁call▁begin｜>',
    () => '<｜tool▁sep｜>',
    '<｜tool▁call▁end｜>',
  ],
  [
    'Kimi K2',
    template('<|tool_calls_section_begin|>'),
    '<|tool_calls_section_begin|>',
    '<|tool_call_begin|>functions.',
    (number: number) => `:${number}<|tool_call_argument_begin|>`,
    '<|tool_call_end|>',
  ],
] as const

describe.each(formats)('in the format of %s', (_, chatTemplate, section, opening, separator, ending) => {
  test('arguments match the schema of the tool, after any text and other calls', async () => {
    for (let seed = 0; seed < 4; seed++) {
      const ask = await serverThatWrites(
        chatTemplate,
        async writer => {
          await writer.write(`I <b>look</b> {"at": < ${section}${opening}`)
          expect(await writer.allows(bytewise('k')[0])).toBe(false)
          await writer.write(`look_up${separator(0)}`)
          await writer.writeRandomly(ending)
          await writer.write(`${opening}stop${separator(1)}`)
          await writer.writeRandomly(ending, '}')
          expect(await writer.allows(end)).toBe(true)
        },
        seed,
      )
      const { choice } = await ask({ tools })
      expect(choice.finish_reason).toBe('tool_calls')
      const [one, two] =
        choice.message.tool_calls?.flatMap(call => (call.type === 'function' ? [call.function] : [])) ?? []
      expect([one?.name, two]).toEqual(['look_up', { name: 'stop', arguments: '{}' }])
      expect(validate(JSON.parse(one.arguments))).toBe(true)
    }
  })

  test('with response_format, the answer is JSON or a call', async () => {
    const ask = await serverThatWrites(chatTemplate, async writer => {
      expect(await writer.allows(bytewise('I')[0])).toBe(false)
      await writer.write(`${section}${opening}look_up${separator(0)}`)
      await writer.writeRandomly(ending)
      expect(await writer.allows(end)).toBe(true)
    })
    const { choice } = await ask({ tools, response_format: { type: 'json_object' } })
    const [call] = choice.message.tool_calls?.flatMap(call => (call.type === 'function' ? [call.function] : [])) ?? []
    expect(validate(JSON.parse((call as { arguments: string }).arguments))).toBe(true)
    const json = await serverThatWrites(chatTemplate, writer => writer.write('{"so": 1}'))
    expect((await json({ tools, response_format: { type: 'json_object' } })).choice.message.content).toBe('{"so": 1}')
  })
})

test('answers without a call are unconstrained', async () => {
  const text = 'It is <tool> {"cold":\n<tool_cal'
  const ask = await serverThatWrites(plainChatTemplate, async writer => {
    await writer.write(text)
    expect(await writer.allows(end)).toBe(true)
  })
  expect((await ask({ tools })).choice).toMatchObject({ finish_reason: 'stop', message: { content: text } })
})

test('after reasoning, which may mention calls', async () => {
  const thinking = template('</think> <tool_call>')
  const ask = await serverThatWrites(`${thinking}<think>`, async writer => {
    await writer.write('so <tool_call>?</think>\n\n<tool_call>\n{"name": "look_up", "arguments": ')
    await writer.writeRandomly('</tool_call>')
  })
  const { message } = (await ask({ tools })).choice
  expect(message).toMatchObject({
    reasoning_content: 'so <tool_call>?',
    tool_calls: [{ function: { name: 'look_up' } }],
  })
})

test('patterns of several tools that take long to convert together are rejected', async () => {
  const ask = await serverThatWrites(plainChatTemplate, writer => writer.write('no'))
  const many = Array.from({ length: 40 }, (_, i) => {
    const parameters = { type: 'object', properties: { a: { type: 'string', pattern: `^.{0,${990 - i}}$` } } }
    return { type: 'function' as const, function: { name: `f${i}`, strict: true, parameters } }
  })
  const { status, error } = await ask({ tools: many })
  expect([status, error?.message]).toEqual([400, expect.stringContaining('too many states')])
})

test.each([{}, { $ref: '#/$defs/a', $defs: { a: { properties: { b: {} } } } }])(
  'arguments are an object if the schema has no type: %j',
  async parameters => {
    const ask = await serverThatWrites(plainChatTemplate, async writer => {
      for (const other of ['5', '"', '[', 'n']) expect(await writer.allows(bytewise(other)[0]), other).toBe(false)
      await writer.write('{"b": [1]}')
    })
    const any = { type: 'function' as const, function: { name: 'any', parameters } }
    const { choice } = await ask({ tools: [any], tool_choice: { type: 'function', function: { name: 'any' } } })
    expect(choice.message.tool_calls).toMatchObject([{ function: { name: 'any', arguments: '{"b": [1]}' } }])
  },
)

test('schemas are checked only if the tool is strict', async () => {
  const ask = await serverThatWrites(plainChatTemplate, writer => writer.write('no'))
  const strict = tools.map(tool => ({ ...tool, function: { ...tool.function, strict: true } }))
  const refused = await ask({ tools: [tools[1], strict[0]] })
  expect([refused.status, refused.error?.param]).toEqual([400, 'tools[1].function.parameters'])
  const forced = await ask({
    tools: [tools[1], strict[0]],
    tool_choice: { type: 'function', function: { name: 'stop' } },
  })
  expect([forced.status, forced.error?.param]).toEqual([400, 'tools[1].function.parameters'])
  expect((await ask({ tools })).status).toBe(200)
})
