import { describe, expect, test } from 'vitest'
import { randomText } from '../scripts/random-text.ts'
import { randomNumbers } from './data/random.ts'
import { feature } from './features.ts'
import { BpeTokenizer } from './index.ts'
import { readSteps, runSteps } from './json/pre-tokenizer-steps.ts'
import { Pattern } from './pattern/pattern.ts'
import { toOniguruma } from './pattern/tiktoken-pattern.ts'
import { preTokenizerJson } from './pre-tokenizers.ts'

/** A rank file of the 256 bytes and these tokens. */
function ranks(...tokens: string[]): string {
  const encode = (bytes: string) => btoa(bytes)
  const lines = Array.from({ length: 256 }, (_, byte) => `${encode(String.fromCharCode(byte))} ${byte}`)
  tokens.forEach((token, i) => {
    lines.push(`${encode(token)} ${256 + i}`)
  })
  return lines.join('\n')
}

/** tiktoken's algorithm: repeatedly merges the neighbours whose concatenation has the lowest rank. */
function reference(text: string, tokens: string[]): number[] {
  const rank = (part: string) =>
    part.length === 1 ? part.charCodeAt(0) : tokens.indexOf(part) < 0 ? Infinity : 256 + tokens.indexOf(part)
  if (rank(text) < Infinity) return [rank(text)]
  const parts = [...text]
  while (true) {
    let best = -1
    for (let i = 0; i + 1 < parts.length; i++) {
      if (rank(parts[i] + parts[i + 1]) < (best < 0 ? Infinity : rank(parts[best] + parts[best + 1]))) best = i
    }
    if (best < 0) return parts.map(rank)
    parts.splice(best, 2, parts[best] + parts[best + 1])
  }
}

test('merges as tiktoken does, also if tokens are unreachable by merges', () => {
  // "cab" reduces to c and ab. "dcba" cannot be reached by merges, but is a token if it is a whole piece.
  const tokens = ['ab', 'cd', 'abc', 'bc', 'cab', 'abab', 'dcba', 'aa', 'aaa', 'aaaa']
  const tokenizer = BpeTokenizer.fromTiktoken(ranks(...tokens), {
    preTokenizer: 'cl100k',
    specialTokens: { '<|end|>': 300 },
  })
  const words = (length: number): string[] =>
    length === 0 ? [''] : words(length - 1).flatMap(word => ['a', 'b', 'c', 'd'].map(x => word + x))
  for (const word of [...words(1), ...words(3), ...words(6), 'a'.repeat(500), 'abcd'.repeat(60)]) {
    expect([...tokenizer.encode(word)], word).toEqual(reference(word, tokens))
  }
  expect([...tokenizer.encode('a<|end|>')]).toEqual([97, 300])
})

test('is saved with the ranks of the file, some of which may be missing, and without an unknown token', () => {
  const file = `${ranks('ab')}\n${btoa('cd')} 300`
  const { model } = BpeTokenizer.fromTiktoken(file, { preTokenizer: 'cl100k' }).toJSON() as { model: object }
  expect(model).toMatchObject({ unk_token: null, fuse_unk: false, ignore_merges: true, vocab: { ab: 256, cd: 300 } })
  expect(model).toHaveProperty('vocab', expect.not.objectContaining({ undefined: expect.anything() }))
})

test('merges as tiktoken does if parts of a token have higher ranks', () => {
  const random = randomNumbers(5)
  const word = (longest: number) =>
    Array.from({ length: 2 + Math.floor(random() * longest) }, () => 'abc'[Math.floor(random() * 3)]).join('')
  for (let round = 0; round < 40; round++) {
    const tokens = [...new Set(Array.from({ length: 25 }, () => word(5)))]
    const tokenizer = BpeTokenizer.fromTiktoken(ranks(...tokens), { preTokenizer: 'cl100k' })
    for (const text of Array.from({ length: 20 }, (_, i) => word(i === 0 ? 200 : 12))) {
      expect([...tokenizer.encode(text)], `${tokens}: ${text}`).toEqual(reference(text, tokens))
    }
  }
})

test('several tokens of more than 96 bytes merge', () => {
  const tokens = ['a', 'b'].flatMap(letter => [2, 4, 8, 16, 32, 64, 128].map(length => letter.repeat(length)))
  const tokenizer = BpeTokenizer.fromTiktoken(ranks(...tokens), { preTokenizer: 'cl100k' })
  expect(['a', 'b'].map(letter => [...tokenizer.encode(letter.repeat(129))])).toEqual([
    [262, 97],
    [269, 98],
  ])
})

test.each([
  ['YQ== 0 1', 'line 1'],
  ['YQ== 0\nYg== 0', 'duplicate rank 0'],
  ['YQ== 0\nYQ== 1', 'are the same token'],
  ['YQ== 0', 'byte 0 has no token'],
  ['YQ== 99999999', 'is not below'],
])('rejects %j', (text, problem) => {
  expect(() => BpeTokenizer.fromTiktoken(text, { preTokenizer: 'gpt2' })).toThrow(problem)
})

test('flags of a RegExp are applied', () => {
  const pieces = (preTokenizer: RegExp, text: string) => {
    const tokenizer = BpeTokenizer.fromTiktoken(ranks('ab', 'AB', 'a\n'), { preTokenizer })
    return [...tokenizer.encode(text)]
  }
  // Matches are separate pieces, which do not merge with their neighbours.
  expect(pieces(/a/, 'AB')).toEqual([257])
  expect(pieces(/a/i, 'AB')).toEqual([65, 66])
  expect(pieces(/a.?/, 'a\n')).toEqual([97, 10])
  expect(pieces(/a.?/s, 'a\n')).toEqual([258])
})

describe("patterns in tiktoken's syntax", () => {
  // Copied from tiktoken 0.14 (tiktoken_ext/openai_public.py) and from older versions.
  const patterns = {
    gpt2: "'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|\\s+(?!\\S)|\\s",
    cl100k:
      "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}++|\\p{N}{1,3}+| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*+|\\s++$|\\s*[\\r\\n]|\\s+(?!\\S)|\\s",
    o200k: [
      "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
      "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
      '\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+',
    ].join('|'),
  }

  test.each(Object.entries(patterns))('split as the scanner of %s does', (name, pattern) => {
    const random = randomNumbers(11)
    const { scanner } = feature(name === 'cl100k' ? 'cl100k-tiktoken' : (name as 'gpt2'))
    const steps = readSteps(preTokenizerJson([toOniguruma(pattern)]))
    const ends = new Int32Array(1000)
    for (let i = 0; i < 1000; i++) {
      const text = `${randomText(random, 16, [])}${i % 3 === 0 ? ' \n\n' : ''}`
      const bytes = new TextEncoder().encode(text)
      const found: number[] = []
      for (let pos = 0; pos < bytes.length; pos = found[found.length - 1])
        found.push(...ends.subarray(0, scanner(bytes, pos, bytes.length, ends)))
      expect([...runSteps(steps, bytes, 0, bytes.length, true).ends], JSON.stringify(text)).toEqual(found)
    }
  })

  test.each([
    ['\\p{N}{1,3}+|^a$', '(?>\\p{N}{1,3})|\\Aa\\z'],
    ['(?s:.)(?i-s)[$^{2}+]{2,}+x{3}?', '(?m:.)(?i-m)(?>[$^{2}+]{2,})x{3}?'],
    ['(?:a(?=b)|[]$]|[^]$]){2}+$', '(?>(?:a(?=b)|[]$]|[^]$]){2})\\z'],
    ['\\$\\{1}+\\x{24}{2}+[a[$]&&[^b]]{1}+', '\\$\\{1}+(?>\\x{24}{2})(?>[a[$]&&[^b]]{1})'],
    ['(?P<word>a){2}+(?<=b$)', '(?>(?<word>a){2})(?<=b\\z)'],
  ])('%s is translated', (pattern, expected) => {
    expect(toOniguruma(pattern)).toBe(expected)
    expect(() => new Pattern(expected)).not.toThrow()
  })

  test.each(['(?m)a$', '(?U:a+)', '[\\p{L}--a]', '[a~~b]'])('%s is not supported', pattern => {
    expect(() => toOniguruma(pattern)).toThrow(expect.objectContaining({ code: 'E_PATTERN' }))
  })

  test('a tokenizer with such a pattern is saved with the same splits', async () => {
    const options = { preTokenizer: { pattern: '\\p{N}{1,2}+|\\s++$|\\s' } }
    const tokenizer = await BpeTokenizer.fromTiktokenAsync(ranks('12', '123', '\n\n'), options)
    const ids = [256, 51, 32, 97, 258]
    expect([...tokenizer.encode('123 a\n\n')]).toEqual(ids)
    expect([...BpeTokenizer.fromJSON(tokenizer.toJSON()).encode('123 a\n\n')]).toEqual(ids)
  })

  test('an unknown name is rejected, with what to pass', async () => {
    const options = { preTokenizer: 'gpt5' as never }
    const message = 'unknown preTokenizer "gpt5"; use one of gpt2, cl100k, o200k, a RegExp or { pattern: text }'
    expect(() => BpeTokenizer.fromTiktoken(ranks(), options)).toThrow(message)
    await expect(BpeTokenizer.fromTiktokenAsync(ranks(), options)).rejects.toThrow(message)
  })
})
