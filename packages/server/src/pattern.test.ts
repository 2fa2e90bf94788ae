/** @file Patterns as grammars, compared with the regular expressions of JavaScript: the automaton, and the grammar library with its EBNF. */
import { Random } from '@moe/core'
import { Ajv2020 } from 'ajv/dist/2020.js'
import addFormats from 'ajv-formats'
import { describe, expect, test } from 'vitest'
import { z } from 'zod'
import { ASCII, type Automaton, Effort, intersect, type Lengths, NON_ASCII, ofLength } from './automaton.ts'
import { Grammars } from './grammars.ts'
import { supportedSchema } from './json-schema.ts'
import { patternAutomaton } from './pattern.ts'
import { bytewise, tokenizer } from './test-server.ts'

const ajv = new Ajv2020({ strict: false })
addFormats.default(ajv)

/** Whether an automaton accepts a text. All non-ASCII characters are one symbol. */
function automatonAccepts({ next, ends }: Automaton, text: string): boolean {
  const state = [...text].reduce((state, character) => {
    const symbol = ASCII.indexOf(character.codePointAt(0) as number)
    return state < 0 ? -1 : next[state][character > '\x7f' ? NON_ASCII : symbol]
  }, 0)
  return state >= 0 && ends[state]
}

const inJson = (text: string) => JSON.stringify(text).slice(1, -1)

/** The regular expression with the flag u if it is valid with it, else without. */
function expressionOf(pattern: string): RegExp {
  try {
    return new RegExp(pattern, 'u')
  } catch {
    return new RegExp(pattern)
  }
}

const patterns = [
  '^a$',
  'a',
  '^a',
  'a$',
  '',
  '^$',
  '^a|b$',
  '^(a|b)c$',
  '^(?:ab?){2,3}$',
  '^(?<year>[0-9]{2})-\\d$',
  '^[^ab]$',
  '^[^a-c]*$',
  '.',
  '^.{2}$',
  '^..?$',
  '^a.*b$',
  '^\\w+$',
  '^\\W\\D\\S?$',
  '^[\\w-]+$',
  '^[a-]b$',
  '^[\\s\\S]$',
  '^\\s$',
  '^["\\\\/]+$',
  '^\\t|\\n$',
  '^\\x61\\u0062$',
  '^\\u{1F642}|\\ud83d\\ude42x$',
  '^[\\u{1F600}-\\u{1F64F}]$',
  '^a+?b*?c??$',
  '^(a?)*b$',
  '^(a*)+$',
  '^((a|)b?){2}$',
  '^a{2}b{1,}c{0,2}$',
  '^a{,2}$',
  '^\\.\\*\\+\\-$',
  '^[.*+]\\[\\]$',
  '^[\\d\\-b]$',
  '^[\\w-b]$',
  '^(^a)$|^(?:b)$',
  '(?:^a$)',
  '\\$1',
  '^[]a',
  '^[^]$',
  '^$|^ab$',
]

describe.each(patterns)('%s', pattern => {
  const expression = expressionOf(pattern)

  test('matches like the regular expression, for random texts', () => {
    let automaton: Automaton | undefined
    try {
      automaton = patternAutomaton(pattern, new Effort())
    } catch (error) {
      expect((error as Error).message).toMatch(/at the ends|no text|non-ASCII/)
      return
    }
    const random = new Random(7)
    const characters = [...'aaabbbccx1-_ .*+[]$"\\/\n\t\ré🙂', '20', '2-1']
    const seen = [0, 0]
    for (let i = 0; i < 3000; i++) {
      const text = Array.from({ length: random.integer(6) }, () => characters[random.integer(characters.length)]).join(
        '',
      )
      const matches = expression.test(text)
      seen[Number(matches)]++
      expect(automatonAccepts(automaton, text), JSON.stringify(text)).toBe(matches)
    }
  })
})

const end = tokenizer.tokenToId('<|end|>') as number
const grammars = new Grammars(tokenizer, [end])

/** A random text of tokens that the grammar allows, or undefined if it does not end. */
async function randomText(schema: object, random: Random, maxTokens = 120): Promise<string | undefined> {
  const [constraint] = await grammars.constraints([[supportedSchema(schema, 'schema')]], 1, 'schema')
  const generated: number[] = []
  try {
    while (generated.length < maxTokens) {
      const words = await constraint.allowed()
      const ids = Array.from({ length: tokenizer.vocabSize }, (_, id) => id).filter(
        id => (words[id >> 5] >>> (id & 31)) & 1,
      )
      expect(ids).not.toHaveLength(0)
      const closing = ids.filter(id => id === end || tokenizer.decode([id]) === '"')
      const from = closing.length > 0 && random.next() < 0.3 ? closing : ids
      const id = from[random.integer(from.length)]
      constraint.accept(id)
      if (id === end) {
        const text = tokenizer.decode(generated)
        return text.includes('\ufffd') ? undefined : text
      }
      generated.push(id)
    }
    return undefined
  } finally {
    constraint.dispose()
  }
}

/** Whether the grammar accepts a text. */
async function grammarAccepts(schema: object, text: string): Promise<boolean> {
  const [constraint] = await grammars.constraints([[supportedSchema(schema, 'schema')]], 1, 'schema')
  try {
    for (const token of [...bytewise(text), end]) {
      const words = await constraint.allowed()
      if (!((words[token >> 5] >>> (token & 31)) & 1)) return false
      constraint.accept(token)
    }
    return true
  } finally {
    constraint.dispose()
  }
}

test('the library generates only matching texts, and accepts matching ones', async () => {
  let ended = 0
  for (const [i, pattern] of patterns.entries()) {
    const schema = { type: 'string', pattern }
    try {
      patternAutomaton(pattern, new Effort())
    } catch {
      continue
    }
    const random = new Random(i)
    const expression = expressionOf(pattern)
    for (let j = 0; j < 4; j++) {
      const text = await randomText(schema, random)
      if (text === undefined) continue
      ended++
      expect(() => JSON.parse(text), `${pattern} ${text}`).not.toThrow()
      expect(JSON.parse(text), `${pattern} ${text}`).toMatch(expression)
    }
    for (const text of ['', 'a', 'b', 'ab', 'abab', 'ababab', 'a"\\b', 'a\nb', '20-1', '🙂', 'xaxb', 'aabb', ' ']) {
      expect(await grammarAccepts(schema, JSON.stringify(text)), `${pattern} ${text}`).toBe(expression.test(text))
    }
  }
  expect(ended).toBeGreaterThan(90)
})

test('an enum allows exactly its values, also if their characters share bytes', async () => {
  const random = new Random(5)
  const letters = [...'abcabc"\\', ...'éũüżźüĩ中丰乭串\u1680\u2000\u2028🙂🙃']
  for (let i = 0; i < 12; i++) {
    const word = (of: number) =>
      Array.from({ length: 1 + random.integer(4) }, () => letters[random.integer(of)]).join('')
    const words = [...new Set(Array.from({ length: 2 + random.integer(10) }, () => word(i % 2 ? 3 : letters.length)))]
    // Beginnings of one text with the ends of another.
    const bytes = words.map(text => Buffer.from(text))
    const mixed = bytes.flatMap(a =>
      bytes.map(b => Buffer.concat([a.subarray(0, random.integer(a.length)), b.subarray(random.integer(b.length))])),
    )
    const probes = new Set([
      ...words,
      ...mixed
        .map(String)
        .filter(text => !text.includes('\ufffd'))
        .slice(0, 40),
      '',
    ])
    for (const text of probes)
      expect(await grammarAccepts({ enum: [...words, 4] }, JSON.stringify(text)), `${words} ${text}`).toBe(
        words.includes(text),
      )
    expect(await grammarAccepts({ enum: [...words, 4] }, '4')).toBe(true)
  }
})

test('the values of an enum may have a long common beginning', async () => {
  const values = ['🙂x', '🙃', '🙂y'].map(end => `"${'ab'.repeat(2000)}"${end}`)
  for (const text of [...values, values[0].slice(0, -1), `${values[0]}x`])
    expect(await grammarAccepts({ enum: values }, JSON.stringify(text))).toBe(values.includes(text))
})

test.each(['é', 'éb', 'é1', 'иa', '中b1', '🙂f', 'ũc', 'a b'])('a property name is matched exactly: %s', async name => {
  const schema = { type: 'object', properties: { [name]: { type: 'null' }, b: { type: 'null' } }, required: [name] }
  for (const other of [name, 'é', 'b', '\u0e9b', '\u0438'])
    expect(await grammarAccepts(schema, `{"${other}":null}`), other).toBe(other === name)
})

test('the library accepts exactly the numbers within bounds', async () => {
  for (const [minimum, maximum] of [
    [13, 143],
    [-112, 7],
    [0, 255],
    [95, 1024],
  ]) {
    for (const x of [
      minimum,
      maximum,
      0,
      5,
      10,
      13,
      99,
      100,
      109,
      112,
      143,
      144,
      150,
      199,
      200,
      256,
      950,
      1000,
      1024,
    ]) {
      for (const value of [x, -x, x - 1, x + 1]) {
        const fits = value >= minimum && value <= maximum
        expect(await grammarAccepts({ type: 'integer', minimum, maximum }, String(value)), `${value}`).toBe(fits)
      }
    }
  }
})

test('up to 20 unsupported patterns are ignored beside a format', () => {
  const schema = (count: number) => ({
    anyOf: Array.from({ length: count }, (_, i) => ({ type: 'string', format: 'date', pattern: `(?=${i})` })),
  })
  expect(() => supportedSchema(schema(20), 'schema')).not.toThrow()
  expect(() => supportedSchema(schema(21), 'schema')).toThrow('more than 20 patterns are not supported (at #/anyOf/20)')
})

test('a format and a pattern must both match', async () => {
  const schema = { type: 'string', format: 'email', pattern: '@corp\\.com$', maxLength: 12 }
  for (const [text, fits] of [
    ['a@corp.com', true],
    ['a@corp.org', false],
    ['@corp.com', false],
    ['abcd@corp.com', false],
  ] as const)
    expect(await grammarAccepts(schema, JSON.stringify(text))).toBe(fits)
})

test.each<[string, Lengths, RegExp]>([
  ['^[a-c]+$', { least: 0, most: 3 }, /^[a-c]{1,3}$/],
  ['^[a-c]*x$', { least: 3, most: 4 }, /^[a-c]{2,3}x$/],
  ['^ab', { least: 3, most: 3 }, /^ab[\s\S]$/u],
  ['a', { least: 1, most: Infinity }, /a/],
  ['^a|b$', { least: 2, most: 2 }, /^a[\s\S]$|^[\s\S]b$/u],
  ['^(a|bb)c$', { least: 2, most: 3 }, /^(a|bb)c$/],
  ['^(a|ccc)$|^bb$', { least: 0, most: 3 }, /^(a|ccc|bb)$/],
  ['^[a-c]{2}$|^x$', { least: 2, most: 9 }, /^[a-c]{2}$/],
  ['^[ab]+$|^[cx]+a*$', { least: 2, most: 4 }, /^([ab]{2,4}|(?=.{2,4}$)[cx]+a*)$/],
])('%s with lengths %j matches like one regular expression', (pattern, lengths, expected) => {
  const effort = new Effort()
  const automaton = intersect(patternAutomaton(pattern, effort), ofLength(lengths, effort), effort)
  const random = new Random(2)
  for (let i = 0; i < 3000; i++) {
    const text = Array.from({ length: random.integer(6) }, () => 'aabbcx🙂'.at(random.integer(6))).join('')
    if (text.isWellFormed()) expect(automatonAccepts(automaton, text), text).toBe(expected.test(text))
  }
})

test.each([
  ['(?=a)b', 'lookaround and flags are not supported'],
  ['(?<!a)b', 'lookaround and flags are not supported'],
  ['(?i:a)', 'lookaround and flags are not supported'],
  ['(a)\\1', '\\1 is not supported'],
  ['\\bword', '\\b is not supported'],
  ['^\\p{L}$', '\\p is not supported'],
  ['\\k<a>(?<a>b)', '\\k is not supported'],
  ['a^b', 'at the ends'],
  ['(^a|b$)c', 'at the ends'],
  ['[', 'Unterminated'],
  ['(', 'Unterminated'],
  ['a**', 'Nothing to repeat'],
  ['^[]$', 'no text'],
  ['^\\x01$', 'no text'],
  ['^((a{99}){99}){99}$', 'too many states'],
  ['^a{0,1000000000}$', 'too many states'],
  [`${'('.repeat(60)}a${')'.repeat(60)}`, 'nested deeper than 50'],
])('%s is rejected: %s', (pattern, message) => {
  expect(() => patternAutomaton(pattern, new Effort())).toThrow(message)
  expect(() => supportedSchema({ type: 'string', pattern }, 'schema')).toThrow('schema: pattern "')
})

test('`.` matches non-ASCII line separators, and \\S non-ASCII white space', async () => {
  for (const [pattern, text] of [
    ['^.$', '\u2028'],
    ['^\\S$', '\u00a0'],
  ])
    expect(await grammarAccepts({ type: 'string', pattern }, `"${text}"`)).toBe(true)
  for (const text of ['\n', '\r', ' '])
    expect(await grammarAccepts({ type: 'string', pattern: '^\\S$' }, inJson(text))).toBe(false)
})

test.each([...'\b\t\n\f\r"\\'])(
  'the character %j has a short escape in JSON, and can be part of a pattern',
  async one => {
    const pattern = `^[\\x${(one.codePointAt(0) as number).toString(16).padStart(2, '0')}]$`
    for (const other of '\b\t\n\f\r"\\a')
      expect(await grammarAccepts({ type: 'string', pattern }, JSON.stringify(other)), other).toBe(other === one)
  },
)

test('a set may contain all non-ASCII characters by their codes', async () => {
  for (const pattern of ['^[\\x80-\\u{10ffff}]$', '^[\\x80-\\udbff\\udfff]$'])
    expect(await grammarAccepts({ type: 'string', pattern }, '"é"')).toBe(true)
})

test.each<[object, string]>([
  [{ pattern: '^[ab]+$', maxLength: 5000 }, 'too many states'],
  [{ pattern: '(a|b)*a(a|b){12}$' }, 'too many states'],
  [{ pattern: '^a$', minLength: 2 }, 'no text'],
  [{ pattern: '^[一-龥]$' }, 'all or none of the non-ASCII characters'],
  [{ pattern: 5 }, 'pattern is not a string'],
  [{ pattern: 'a', format: 'unknown' }, 'format "unknown" is not supported'],
  [{ pattern: '^a', format: 'date' }, 'no text'],
])('%j is rejected: %s', (schema, message) => {
  expect(() => supportedSchema({ type: 'string', ...schema }, 'schema')).toThrow(message)
})

test('patterns that need too many states together are rejected, with equal patterns counted once', () => {
  const all = (count: number) =>
    Array.from({ length: count }, (_, i) => ({ type: 'string', pattern: `^.{${400 + i}}$` }))
  expect(() => supportedSchema({ anyOf: all(9) }, 'schema')).toThrow('too many states')
  const equal = Array.from({ length: 200 }, () => all(1)[0])
  expect(Object.keys(supportedSchema({ anyOf: equal }, 'schema').rules)).toHaveLength(1)
})

test('patterns that take long to convert are rejected, alone or together', () => {
  const optional = [...'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'].map(letter => `${letter}?`).join('')
  // 937 states, each with the followers of up to 936 positions.
  expect(() => supportedSchema({ type: 'string', pattern: `^(?:${optional}){18}$` }, 'schema')).toThrow(
    'too many states',
  )
  // Each pattern is converted before the next one reduces the states.
  const patterns = Array.from({ length: 60 }, (_, i) => ({ pattern: `^.{0,${900 - i}}$` }))
  expect(() => supportedSchema({ type: 'string', allOf: [...patterns, { maxLength: 2 }] }, 'schema')).toThrow(
    'too many states',
  )
})

test("generated texts of Zod's string formats are accepted by Zod and ajv", async () => {
  const all = {
    starts: z.string().startsWith('a"'),
    holds: z.string().includes('\\ b'),
    ends: z.string().endsWith('.'),
    lower: z.string().lowercase().max(5),
    code: z.string().regex(/^[A-Z]{2}\d{3}$/),
    nano: z.nanoid(),
    cuid: z.cuid2(),
    ulid: z.ulid(),
    phone: z.e164(),
    bytes: z.base64(),
    six: z.ipv6(),
    host: z.hostname(),
    url: z.url(),
    long: z.iso.duration(),
    plate: z.templateLiteral(['B-', z.int(), '!']),
  }
  let ended = 0
  for (const [name, type] of Object.entries(all)) {
    const { $schema: _, ...schema } = z.toJSONSchema(type)
    const validate = ajv.compile(schema)
    for (let seed = 0; seed < 5; seed++) {
      const text = await randomText(schema, new Random(seed), 400)
      if (text === undefined) continue
      ended++
      expect(type.safeParse(JSON.parse(text)).error, `${name} ${text}`).toBeUndefined()
      expect(validate(JSON.parse(text)), `${name} ${text}`).toBe(true)
    }
  }
  expect(ended).toBeGreaterThan(50)
})

test('generated texts of a format are accepted by ajv', async () => {
  for (const format of ['time', 'duration', 'ipv6', 'hostname', 'uri']) {
    const validate = ajv.compile({ format })
    for (let seed = 0; seed < 8; seed++) {
      const text = await randomText({ type: 'string', format }, new Random(seed), 300)
      if (text !== undefined) expect(validate(JSON.parse(text)), `${format} ${text}`).toBe(true)
    }
  }
})
