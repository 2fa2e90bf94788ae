/** @file Random texts that a grammar allows are JSON that matches its schema. */
import { Random } from '@moe/core'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import { Ajv2020 } from 'ajv/dist/2020.js'
import addFormats from 'ajv-formats'
import { expect, test } from 'vitest'
import { z } from 'zod'
import { Grammars } from './grammars.ts'
import { supportedSchema } from './json-schema.ts'
import { type Bounds, numberRange } from './number-range.ts'
import { bytewise, tokenizer } from './test-server.ts'

const end = tokenizer.tokenToId('<|end|>') as number
const grammars = new Grammars(tokenizer, [end])

const ajv = new Ajv2020({ strict: false })
addFormats.default(ajv)

/** A random text of allowed tokens, which prefers closing tokens as it gets longer, or undefined if it does not end. */
async function randomText(
  form: Parameters<Grammars['constraints']>[0],
  random: Random,
  maxTokens = 400,
): Promise<string | undefined> {
  const [constraint] = await grammars.constraints(form, 1, 'schema')
  const generated: number[] = []
  try {
    while (generated.length < maxTokens) {
      const words = (await constraint.allowed()) as Int32Array
      const ids = Array.from({ length: tokenizer.vocabSize }, (_, id) => id).filter(
        id => (words[id >> 5] >>> (id & 31)) & 1,
      )
      expect(ids).not.toHaveLength(0)
      const closing = ids.filter(id => id === end || /^["\]}]+$/.test(tokenizer.decode([id])))
      const eager = closing.length > 0 && random.next() < Math.min(0.9, generated.length / 60)
      const from = eager ? closing : ids
      const id = from[Math.floor(random.next() * from.length)]
      constraint.accept(id)
      if (id === end) {
        const text = tokenizer.decode(generated)
        // The library accepts unpaired surrogates in UTF-8, which decoders replace.
        return text.includes('\ufffd') ? undefined : text
      }
      generated.push(id)
    }
    return undefined
  } finally {
    constraint.dispose()
  }
}

function randomSchema(random: Random, depth = 0): Record<string, unknown> {
  const below = (n: number) => Math.floor(random.next() * n)
  const deeper = () => randomSchema(random, depth + 1)
  const names = ['a', 'b c', "q'", 'éb', '$ref', 'type', '', '{}', 'a,']
  const kinds = [
    () => ({ type: 'string' }),
    () => ({ type: 'string', minLength: below(3), maxLength: 3 + below(4) }),
    () => ({ type: 'integer' }),
    () => ({ type: 'integer', minimum: below(300) - 150, maximum: 150 + below(9000) }),
    () => ({ type: 'integer', exclusiveMinimum: below(50) - 70 }),
    () => ({ type: 'number' }),
    () => ({ type: 'number', minimum: (below(100) - 50) / 4, maximum: 13 + below(100) / 8 }),
    () => ({ type: 'number', exclusiveMinimum: below(3) - 1, exclusiveMaximum: 1e6 }),
    () => ({ type: ['boolean', 'null'] }),
    () => ({ enum: ['x', 'y"\\', 'é\n', 4, -1.5, null, true, { a: [1] }].slice(below(4)) }),
    () => ({ const: ['x', 5, { k: 'é' }][below(3)] }),
    () => ({ type: 'string', enum: ['', 'one', 2] }),
    () => ({
      type: ['string', 'null'],
      format: ['date', 'date-time', 'uuid', 'ipv4', 'email'][below(5)],
      pattern: '^',
    }),
  ]
  const nested = [
    () => ({ type: 'array', items: deeper(), minItems: below(3), maxItems: 2 + below(3) }),
    () => ({ type: 'array', items: deeper() }),
    () => ({ type: 'array', prefixItems: [deeper(), deeper()] }),
    () => {
      const all = Object.fromEntries(names.slice(below(4), 4 + below(5)).map(name => [name, deeper()]))
      return { type: 'object', properties: all, required: Object.keys(all).filter(() => below(2) === 0), title: 'x' }
    },
    () => ({ type: 'object', additionalProperties: deeper() }),
    () => ({ anyOf: [deeper(), deeper()], description: 'either' }),
    () => ({ allOf: [deeper(), {}, { title: 'x' }], description: 'all' }),
    () => ({ properties: { n: deeper() } }),
  ]
  const all = depth < 3 ? [...kinds, ...nested, ...nested] : kinds
  return all[below(all.length)]()
}

function isJson(text: string): boolean {
  try {
    JSON.parse(text)
    return true
  } catch {
    return false
  }
}

test('for random schemas, every finished text is JSON that validates', async () => {
  let ended = 0
  for (let seed = 0; seed < 150; seed++) {
    const random = new Random(seed)
    const schema = randomSchema(random)
    const validate = ajv.compile(schema)
    for (let i = 0; i < 4; i++) {
      const text = await randomText([[supportedSchema(schema, 'schema')]], random)
      if (text === undefined) continue
      ended++
      expect(isJson(text), `${JSON.stringify(schema)}\n${text}`).toBe(true)
      expect(validate(JSON.parse(text)), `${JSON.stringify(schema)}\n${text}`).toBe(true)
    }
  }
  expect(ended).toBeGreaterThan(400)
})

test('Zod schemas are supported, and Zod accepts the texts', async () => {
  const schema = z.object({
    name: z.string().min(1).max(9).describe('of the speaker'),
    age: z.int().positive(),
    share: z.number().gt(0).max(1),
    when: z.iso.date(),
    at: z.iso.datetime(),
    id: z.uuid(),
    mail: z.email().nullable(),
    kind: z.enum(['speech', 'letter']).optional(),
    words: z.array(z.string()).max(3),
    pair: z.tuple([z.boolean(), z.int()]),
    by: z.discriminatedUnion('of', [
      z.object({ of: z.literal('state'), code: z.int().min(1).max(50) }),
      z.object({ of: z.literal('city'), parent: z.record(z.string(), z.number()) }),
    ]),
    get reply() {
      return z.union([schema.pick({ name: true }), z.null()])
    },
  })
  for (const io of ['input', 'output'] as const) {
    const form = [[supportedSchema(z.toJSONSchema(schema, { io }), 'schema')]]
    let ended = 0
    for (let seed = 0; seed < 20; seed++) {
      const text = await randomText(form, new Random(seed), 1000)
      if (text === undefined) continue
      ended++
      expect(schema.safeParse(JSON.parse(text)).error, text).toBeUndefined()
    }
    expect(ended).toBeGreaterThan(10)
  }
})

test('numbers are within bounds, and every one of them with few decimals is allowed', () => {
  const pattern = (range: string) => new RegExp(`^(?:${range})$`)
  const random = new Random(1)
  const below = (n: number) => Math.floor(random.next() * n)
  for (let i = 0; i < 300; i++) {
    const scale = [10, 100, 2000][below(3)]
    const least = (below(2 * scale) - scale) / (i % 3 === 0 ? 4 : 1)
    const most = least + below(scale)
    const bounds = [
      { minimum: least, maximum: most },
      { minimum: least },
      { maximum: most },
      { exclusiveMinimum: least },
      { exclusiveMaximum: most },
      { minimum: least, exclusiveMaximum: most + 1 },
    ][i % 6]
    const {
      minimum = -Infinity,
      maximum = Infinity,
      exclusiveMinimum = -Infinity,
      exclusiveMaximum = Infinity,
    } = bounds as Bounds
    const fits = (x: number) => x >= minimum && x <= maximum && x > exclusiveMinimum && x < exclusiveMaximum
    for (const type of ['integer', 'number'] as const) {
      const range = numberRange(type, bounds as Bounds)
      const written = range === undefined ? /^x$/ : pattern(range)
      const wrong = Array.from({ length: 7500 }, (_, i) => i - 2500).filter(x => written.test(String(x)) !== fits(x))
      for (let j = 0; j < 500; j++) {
        const x = Math.round(1000 * (least + (random.next() - 0.5) * 3 * scale)) / 1000
        if (Number.isInteger(x)) continue
        if (written.test(String(x)) !== (type === 'number' && fits(x))) wrong.push(x)
      }
      expect(wrong, JSON.stringify(bounds)).toEqual([])
      for (const text of ['', '-', '01', '-01', '1.', '1.0', '.5', '-0']) expect(written.test(text)).toBe(false)
    }
  }
  const free = [{}, { minimum: -1e300 }, { maximum: 1e300, exclusiveMinimum: -2e16 }]
  for (const bounds of free) expect(numberRange('integer', bounds)).toBe(numberRange('integer', {}))
  const none = [{ minimum: 1e300 }, { exclusiveMaximum: -1e17 }, { minimum: 2, maximum: 1 }]
  for (const bounds of none) expect(numberRange('number', bounds)).toBeUndefined()
  const { MAX_SAFE_INTEGER: most } = Number
  const safe = pattern(numberRange('integer', { minimum: -most, maximum: most }) as string)
  expect(['9007199254740991', '-9007199254740991', '0'].map(text => safe.test(text))).toEqual([true, true, true])
  expect(['9007199254740992', '-9007199254740992', '10000000000000000'].some(text => safe.test(text))).toBe(false)
})

test('numbers may be close to bounds that are not integers', () => {
  const random = new Random(2)
  const written = (x: number) => x.toFixed(6).replace(/\.?0+$/, '')
  const bounds: Bounds[] = [
    { minimum: 0.1, maximum: 0.9 },
    { minimum: 0, maximum: 0.5 },
    { exclusiveMinimum: -0.25, exclusiveMaximum: 0.2 },
    { minimum: -2.75, maximum: -2.5 },
    { minimum: 1.05, maximum: 3.000001 },
    { exclusiveMinimum: 0.1234567, maximum: 0.123459 },
    { minimum: 1e-7, exclusiveMaximum: 1e-5 },
    { minimum: 0.5, maximum: 0.5 },
    { minimum: 0.5, maximum: 1 },
    { exclusiveMinimum: -2, maximum: -0.999 },
    { exclusiveMinimum: 0.5 },
    { minimum: 1e-7 },
    { minimum: 1e-7, exclusiveMaximum: 0.99999 },
    { maximum: -1000.25 },
  ]
  for (const one of bounds) {
    const { minimum = -Infinity, maximum = Infinity, exclusiveMinimum = -Infinity, exclusiveMaximum = Infinity } = one
    const pattern = new RegExp(`^(?:${numberRange('number', one)})$`)
    const ends = Object.values(one) as number[]
    const probes = ends.flatMap(end =>
      Array.from({ length: 400 }, (_, i) => {
        const near = i < 200 ? (i % 20) - 10 : Math.round((random.next() - 0.5) * 10 ** (2 + (i % 5)))
        return Math.round(1e6 * end + near) / 1e6
      }),
    )
    const fits = (x: number) => x >= minimum && x <= maximum && x > exclusiveMinimum && x < exclusiveMaximum
    const wrong = probes.filter(x => pattern.test(written(x + 0)) !== fits(Number(written(x + 0))))
    expect(wrong, JSON.stringify(one)).toEqual([])
    expect(probes.filter(fits).length, JSON.stringify(one)).toBeGreaterThan(0)
    for (const text of ['0.', '1.', '-0.', '0.10', '0.0', '-0', '.5']) expect(pattern.test(text), text).toBe(false)
  }
  for (const none of [
    { exclusiveMinimum: 0.5, maximum: 0.5 },
    { minimum: 0.1234567, maximum: 0.1234569 },
  ])
    expect(numberRange('number', none)).toBeUndefined()
})

test.each<[what: string, ref: string, $defs: Record<string, object>]>([
  ['trees', '#', {}],
  [
    'lists',
    '#/$defs/list',
    {
      list: { anyOf: [{ type: 'null' }, { $ref: '#/$defs/pair' }] },
      pair: { type: 'array', prefixItems: [{ $ref: '#' }, { $ref: '#/$defs/list' }] },
    },
  ],
  ['empty arrays', '#/$defs/a', { a: { type: 'array', items: { $ref: '#/$defs/a' } } }],
  [
    'merged schemas',
    '#/$defs/a',
    {
      a: { allOf: [{ $ref: '#/$defs/b' }, { required: ['x'] }] },
      b: { type: 'object', properties: { x: { type: 'null' }, y: { $ref: '#/$defs/a' }, z: { $ref: '#/$defs/b' } } },
    },
  ],
  [
    'schemas merged with themselves',
    '#/$defs/a',
    {
      a: {
        type: 'object',
        properties: { x: { type: 'null' }, y: { allOf: [{ $ref: '#/$defs/a' }, { required: ['x'] }] } },
      },
    },
  ],
  ['names with special characters', '#/$defs/a~1b~0%20%25', { 'a/b~ %': { type: 'null' } }],
  ['definitions that are not used', '#/$defs/a', { a: { type: 'null' }, b: { $ref: '#/$defs/b' }, c: { not: {} } }],
])('recursive schemas allow texts that match: %s', async (_, $ref, $defs) => {
  const schema = { type: 'object', properties: { a: { $ref }, b: { type: 'boolean' } }, required: ['b'], $defs }
  const validate = ajv.compile(schema)
  let nested = 0
  for (let seed = 0; seed < 12; seed++) {
    const text = await randomText([[supportedSchema(schema, 'schema')]], new Random(seed))
    if (text === undefined) continue
    expect(validate(JSON.parse(text)), text).toBe(true)
    if (/"a"/.test(text)) nested++
  }
  expect(nested).toBeGreaterThan(2)
})

test('a schema that cannot be compiled is rejected, and other texts continue', async () => {
  const one = [[supportedSchema({ type: 'boolean' }, 'schema')]]
  const [before] = await grammars.constraints(one, 1, 'schema')
  for (let i = 0; i < 3; i++) {
    const broken = grammars.constraints(
      [[{ schema: { type: 'nonsense' }, rules: {}, characters: 0 }]],
      1,
      'response_format',
    )
    await expect(broken).rejects.toMatchObject({
      status: 400,
      param: 'response_format',
      message: 'response_format: cannot compile a grammar: Unsupported type "nonsense"',
    })
  }
  // Its instance of the library is retired after the failures.
  expect(((await before.allowed()) as Int32Array).some(word => word !== 0)).toBe(true)
  before.dispose()
  expect(await randomText(one, new Random(1))).toMatch(/^(true|false)$/)
  const endless = new Grammars(tokenizer, [])
  await expect(endless.constraints(one, 1, 'schema')).rejects.toThrow('has no end token')
})

test.each([127, 128, 129, 255, 256, 257, 1000])('string limits of %i characters are exact', async length => {
  for (const bounds of [{ maxLength: length }, { minLength: length, maxLength: length }]) {
    const [constraint] = await grammars.constraints(
      [[supportedSchema({ type: 'string', ...bounds }, 'schema')]],
      1,
      'a',
    )
    for (const token of bytewise(`"${'a'.repeat(length)}`)) constraint.accept(token)
    const words = await constraint.allowed()
    const ids = Array.from({ length: tokenizer.vocabSize }, (_, id) => id).filter(
      id => (words[id >> 5] >>> (id & 31)) & 1,
    )
    expect(ids.map(id => tokenizer.decode([id]))).toEqual(['"'])
    constraint.dispose()
  }
  const [short] = await grammars.constraints(
    [[supportedSchema({ type: 'string', minLength: length }, 'schema')]],
    1,
    'a',
  )
  for (const token of bytewise(`"${'a'.repeat(length - 1)}`)) short.accept(token)
  const [quote] = bytewise('"')
  expect(((await short.allowed())[quote >> 5] >>> (quote & 31)) & 1).toBe(0)
  short.accept(bytewise('a')[0])
  expect(((await short.allowed())[quote >> 5] >>> (quote & 31)) & 1).toBe(1)
  short.dispose()
})

test('string lengths that take too long to compile are rejected', async () => {
  const lengths = (...of: object[]) => [
    [supportedSchema({ anyOf: of.map(one => ({ type: 'string', ...one })) }, 'schema')],
  ]
  // The vocabulary size of DeepSeek-V3.
  const vocabulary = { addedTokens: [], vocabSize: 128_815, idToToken: String, tokenBytes: () => Uint8Array.of(97) }
  const large = new Grammars(vocabulary as unknown as BpeTokenizer, [end])
  const many = lengths({ maxLength: 1e6 }, { minLength: 1e5 }, { minLength: 3, maxLength: 12 })
  await expect(large.constraints(many, 1, 'schema')).rejects.toThrow(
    "add up to 524, but the limit for this model's vocabulary is 520",
  )
  // Equal lengths count once.
  const equal = lengths(...Array.from({ length: 200 }, () => ({ minLength: 1, maxLength: 100 })))
  for (const constraint of await grammars.constraints(equal, 2, 'schema')) constraint.dispose()
})

test('control tokens are not allowed in JSON, and literal texts of a form are exact', async () => {
  const form = [
    ['a\n', supportedSchema({ type: 'array', items: { type: 'string' } }, 'schema'), ' end'],
    ['ab"', supportedSchema({ type: 'null' }, 'schema')],
  ]
  const texts = new Set<string>()
  for (let seed = 0; seed < 60; seed++) {
    const text = await randomText(form, new Random(seed))
    if (text !== undefined) texts.add(text)
  }
  for (const text of texts) expect(text).toMatch(/^(a\n\[[\s\S]*\] end|ab"null)$/)
  expect(texts).toContain('ab"null')
  expect([...texts].filter(text => text.startsWith('a\n')).length).toBeGreaterThan(5)
  expect([...texts].some(text => text.includes('<|'))).toBe(false)
  // A control token in a literal text of the form is allowed as one token.
  const user = tokenizer.tokenToId('<|user|>') as number
  const written = new Grammars(tokenizer, [end], 'a<|user|>')
  const [constraint] = await written.constraints([['<|user|>']], 1, 'schema')
  const words = (await constraint.allowed()) as Int32Array
  expect((words[user >> 5] >>> (user & 31)) & 1).toBe(1)
  constraint.dispose()
})
