/** @file Bodies and fields that are rejected: of wrong types, out of range, unsupported, or too large. */
import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { errorOf, type Path, paths, rejection, shown, stillServes, validBodies } from './test-rejections.ts'
import { modelServer, post, tokenizer } from './test-server.ts'

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
