import { describe, expect, test } from 'vitest'
import { type AddedToken, AddedTokenFinder } from './added-tokens.ts'
import './index.ts'

const utf8 = new TextEncoder()
const tokensOf = (contents: readonly string[], flags: Partial<AddedToken> = {}): AddedToken[] =>
  contents.map((content, id) => ({
    id,
    content,
    special: false,
    normalized: false,
    lstrip: false,
    rstrip: false,
    single_word: false,
    ...flags,
  }))

/** Splits a text into texts and indices of tokens. */
function split(contents: readonly string[], text: string, flags?: Partial<AddedToken>): (string | number)[] {
  const bytes = utf8.encode(text)
  const found: (string | number)[] = []
  const piece = (from: number, to: number) => found.push(new TextDecoder().decode(bytes.subarray(from, to)))
  new AddedTokenFinder(tokensOf(contents, flags), token => utf8.encode(token.content)).split(
    bytes,
    0,
    bytes.length,
    0,
    piece,
    token => found.push(token.id),
  )
  return found
}

/** The same by trying all tokens at all positions, as the expected result. */
function bruteForce(contents: readonly string[], text: string): (string | number)[] {
  const found: (string | number)[] = []
  let pending = ''
  for (let at = 0; at < text.length; ) {
    const here = contents.filter(content => text.startsWith(content, at))
    if (here.length === 0) pending += text[at++]
    else {
      const longest = here.reduce((a, b) => (b.length > a.length ? b : a))
      if (pending !== '') found.push(pending)
      pending = ''
      found.push(contents.indexOf(longest))
      at += longest.length
    }
  }
  return pending === '' ? found : [...found, pending]
}

let state = 5
const below = (n: number) => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0
  return Math.floor((state / 2 ** 32) * n)
}
const word = (letters: string, length: number) => {
  const all = [...letters]
  return Array.from({ length }, () => all[below(all.length)]).join('')
}

describe('AddedTokenFinder finds the leftmost, longest token', () => {
  test.each([
    ['by the trie', 12],
    ['by the automaton', 240],
  ])('%s', (_, longest) => {
    for (let i = 0; i < 300; i++) {
      const letters = ['a', 'ab', 'aé🙂'][below(3)]
      const contents = [...new Set(Array.from({ length: 1 + below(6) }, () => word(letters, 1 + below(8))))]
      contents.push(`${word(letters, longest - 1)}c`)
      const text = Array.from({ length: 20 }, () =>
        below(3) === 0 ? contents[below(contents.length)] : word(`${letters}c`, below(10)),
      ).join('')
      expect(split(contents, text)).toEqual(bruteForce(contents, text))
    }
  })

  test('across window boundaries', () => {
    const long = `${'ab'.repeat(200)}c`
    const contents = ['ba', 'abab', long]
    for (const before of [65_300, 65_400, 65_535, 65_536, 131_000]) {
      const text = `${'x'.repeat(before)}${long}x${long}ba${'ab'.repeat(300)}`
      expect(split(contents, text)).toEqual(bruteForce(contents, text))
    }
  })

  test('in linear time if a long token nearly matches at every position', () => {
    const contents = [`${'a'.repeat(1000)}b`, 'aa']
    const text = 'a'.repeat(400_000)
    expect(split(contents, text)).toHaveLength(200_000)
  })

  test('in linear time if every token includes the same white space', () => {
    expect(split(['\n'], '\n'.repeat(400_000), { rstrip: true })).toHaveLength(400_000)
    expect(split(['\n', 'x'], 'a\n \nb\n x\n', { rstrip: true })).toEqual(['a', 0, 0, 'b', 0, 1, 0])
  })
})
