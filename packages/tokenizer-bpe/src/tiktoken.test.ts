import { expect, test } from 'vitest'
import { BpeTokenizer } from './index.ts'

/** Ranks of the 256 bytes, then of these tokens. */
function ranks(...tokens: string[]): string {
  const encode = (bytes: string) => btoa(bytes)
  const lines = Array.from({ length: 256 }, (_, byte) => `${encode(String.fromCharCode(byte))} ${byte}`)
  tokens.forEach((token, i) => {
    lines.push(`${encode(token)} ${256 + i}`)
  })
  return lines.join('\n')
}

/** tiktoken's own way: the neighbours whose bytes together have the lowest rank, again and again. */
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

test('merges as tiktoken does, tokens out of reach included', () => {
  // "cab" comes down to c and ab; "bcd" cannot be reached, for cd goes first and nothing makes b + cd... but it is a token as a whole piece.
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

test.each([
  ['YQ== 0 1', 'line 1'],
  ['YQ== 0\nYg== 0', 'duplicate rank 0'],
  ['YQ== 0\nYQ== 1', 'are the same token'],
  ['YQ== 0', 'byte 0 has no token'],
  ['YQ== 99999999', 'is not below'],
])('refuses %j', (text, problem) => {
  expect(() => BpeTokenizer.fromTiktoken(text, { preTokenizer: 'gpt2' })).toThrow(problem)
})

test('flags of a regular expression count', () => {
  const pieces = (preTokenizer: RegExp, text: string) => {
    const tokenizer = BpeTokenizer.fromTiktoken(ranks('ab', 'AB', 'a\n'), { preTokenizer })
    return [...tokenizer.encode(text)]
  }
  // Where the letters are a piece of their own, they do not merge with what stands beside them.
  expect(pieces(/a/, 'AB')).toEqual([257])
  expect(pieces(/a/i, 'AB')).toEqual([65, 66])
  expect(pieces(/a.?/, 'a\n')).toEqual([97, 10])
  expect(pieces(/a.?/s, 'a\n')).toEqual([258])
})
