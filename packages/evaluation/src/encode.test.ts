import { trainBpe } from '@moe/tokenizer-bpe'
import { describe, expect, test } from 'vitest'
import { TextEncoder } from './encode.ts'
import { characters, textOf } from './test-model.ts'

const BEGIN = '^'.codePointAt(0) as number
const encoder = (options: { bos?: number | null; prefix?: number; context?: number } = {}) =>
  new TextEncoder({ tokenizer: characters, bos: null, prefix: BEGIN, context: 100, ...options })

const split = ({ ids, from, truncated }: { ids: readonly number[]; from: number; truncated: boolean }) => [
  textOf(ids.slice(0, from)),
  textOf(ids.slice(from)),
  truncated,
]

describe('a context and its continuation', () => {
  test('have the white space between them in the continuation', () => {
    expect(split(encoder().pair('a b', ' c', ''))).toEqual(['a b', ' c', false])
    expect(split(encoder().pair('a b \n', 'c', ''))).toEqual(['a b', ' \nc', false])
  })

  test('are encoded as one text, and split after the number of tokens of the context alone', () => {
    const tokenizer = trainBpe(['ab ab ab ab abc abc abc abcd abcd abcd'], { vocabSize: 300, minFrequency: 1 })
    const textEncoder = new TextEncoder({ tokenizer, bos: null, prefix: 0, context: 100 })
    const ids = Array.from(tokenizer.encode('ab abcd'))
    const separately = [...tokenizer.encode('ab ab'), ...tokenizer.encode('cd')]
    expect(ids).not.toEqual(separately)
    // Both together are "ab" and " abcd", as many tokens as the context alone.
    expect(() => textEncoder.pair('ab ab', 'cd', 'here')).toThrow('here: "cd" adds no tokens to its context')
    expect(textEncoder.pair('ab ab', 'cd ab', '')).toEqual({
      ids: [...ids, ...tokenizer.encode(' ab')],
      from: 2,
      truncated: false,
    })
  })

  test('have the prefix or begin token as context if it is empty', () => {
    expect(split(encoder().pair('', 'xy', ''))).toEqual(['^', 'xy', false])
    expect(split(encoder().pair('  ', 'xy', ''))).toEqual(['^', '  xy', false])
    expect(split(encoder().pair('', '^xy', ''))).toEqual(['^', 'xy', false])
    expect(split(encoder({ bos: 36 }).pair('', 'xy', ''))).toEqual(['$', 'xy', false])
    expect(() => encoder({ prefix: undefined }).pair('', 'xy', '')).toThrow('pass prefix, the id of a token')
  })

  test('start with exactly one begin token', () => {
    expect(split(encoder({ bos: 36 }).pair('ab', ' c', ''))).toEqual(['$ab', ' c', false])
    expect(split(encoder({ bos: 36 }).pair('$ab', ' c', ''))).toEqual(['$ab', ' c', false])
    const tokenizer = {
      ...characters,
      encode: (text: string, options?: { addSpecialTokens?: boolean }) =>
        characters.encode(options?.addSpecialTokens === false ? text : `$${text}`),
    }
    const textEncoder = new TextEncoder({ tokenizer, bos: undefined, prefix: BEGIN, context: 100 })
    expect(split(textEncoder.pair('ab', ' c', ''))).toEqual(['$ab', ' c', false])
    expect(split(textEncoder.pair('', 'c', ''))).toEqual(['$', 'c', false])
    expect(split(textEncoder.pair('', '$c', ''))).toEqual(['$', 'c', false])
    expect(textEncoder.windows('ab').map(split)).toEqual([['$', 'ab', false]])
  })

  test('are truncated on the left if they exceed the context length, not counting the last token', () => {
    expect(split(encoder({ context: 5 }).pair('abcd', 'ef', ''))).toEqual(['abcd', 'ef', false])
    expect(split(encoder({ context: 5 }).pair('abcde', 'fg', ''))).toEqual(['bcde', 'fg', true])
    expect(split(encoder({ context: 2 }).pair('abcde', 'fg', ''))).toEqual(['e', 'fg', true])
    expect(() => encoder({ context: 2 }).pair('a', 'efg', 'here')).toThrow(
      "here: an answer has 3 tokens, but the model's context length is 2",
    )
    expect(() => encoder().pair('a', '', 'here')).toThrow('here: "" adds no tokens to its context')
  })
})

test('a prompt leaves room for the generated answer', () => {
  expect(encoder({ context: 5 }).prompt('abc', 2)).toEqual({ ids: [97, 98, 99], truncated: false })
  expect(encoder({ context: 5 }).prompt('abcd', 2)).toEqual({ ids: [98, 99, 100], truncated: true })
  expect(() => encoder({ context: 5 }).prompt('abcd', 5)).toThrow('leave no room for a prompt in a context of 5')
})

describe('a text', () => {
  test('is split into windows that predict each token once', () => {
    const pieces = (text: string) => encoder({ context: 4 }).windows(text).map(split)
    expect(pieces('')).toEqual([])
    expect(pieces('abc')).toEqual([['^', 'abc', false]])
    expect(pieces('abcd')).toEqual([['^', 'abcd', false]])
    // The last window has as much context as fits.
    expect(pieces('abcde')).toEqual([
      ['^', 'abcd', false],
      ['abcd', 'e', false],
    ])
    expect(pieces('abcdefghij')).toEqual([
      ['^', 'abcd', false],
      ['d', 'efgh', false],
      ['fgh', 'ij', false],
    ])
  })

  test.each([1, 2, 3, 7])('of any length is covered by windows within a context of %i', context => {
    for (let length = 0; length < 30; length++) {
      const text = Array.from({ length }, (_, i) => String.fromCodePoint(200 + i)).join('')
      const pieces = encoder({ context }).windows(text)
      expect(pieces.map(piece => split(piece)[1]).join('')).toBe(text)
      for (const { ids, from } of pieces) {
        expect(from).toBeGreaterThan(0)
        expect(ids.length).toBeLessThanOrEqual(context + 1)
      }
    }
  })
})
