import { describe, expect, test } from 'vitest'
import { randomText } from '../../scripts/random-text.ts'
import { randomNumbers } from '../data/random.ts'
import { fillFromTable } from '../unicode/pinned-classes.ts'
import { Pattern } from './pattern.ts'

fillFromTable()

function find(source: string, text: string): string[] {
  const bytes = new TextEncoder().encode(text)
  const matches = new Pattern(source).matches(bytes, 0, bytes.length)
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
  return Array.from({ length: matches.length / 2 }, (_, i) =>
    decoder.decode(bytes.subarray(matches[2 * i], matches[2 * i + 1])),
  )
}

describe('agrees with RegExp', () => {
  // Only features with the same meaning in both: no \s, \w or \p{L}, whose Unicode versions may differ.
  const sources = [
    '[a-z]+|[0-9]{1,3}',
    "'(?:s|t|ll)|[A-Za-z]+?(?=[A-Z])|[^a-z ]",
    '(?:ab?|b)+c*',
    '[ \\n]+(?! )|[^ ]',
    '(?<=[a-z])[A-Z]|(?<![0-9])[.,]',
    '(?:[a-m]{2}|[n-z]){2,3}|[一-龥]+',
  ]
  for (const source of sources) {
    test(source, () => {
      const random = randomNumbers(3)
      for (let i = 0; i < 500; i++) {
        const text = randomText(random, 20, [])
        expect(find(source, text), JSON.stringify(text)).toEqual(text.match(new RegExp(source, 'gu')) ?? [])
      }
    })
  }
})

test('possessive repetition and atomic groups do not backtrack', () => {
  expect(find('a++a', 'aaa')).toEqual([])
  expect(find('(?>a+)b', 'aab')).toEqual(['aab'])
  expect(find('a+a', 'aaa')).toEqual(['aaa'])
})

describe('nested repetition', () => {
  test('is linear because failures are memoized', () => {
    expect(find('(?:a+)+$', `${'a'.repeat(5000)}b`)).toEqual([])
    expect(find('(?:a|a|aa)*c|.', 'a'.repeat(2000))).toHaveLength(2000)
    expect(find('\\s+$|\\s|b', `${' '.repeat(100_000)}b`)).toHaveLength(100_001)
    expect(find('(?:x*y*)z|x', 'xy'.repeat(10_000))).toHaveLength(10_000)
  })

  test('throws if memoizing is not enough', () => {
    expect(() => find('(?=\\s*b)c', `${' '.repeat(200_000)}b`)).toThrow(
      /takes more than \d+ steps on a text of 200001 bytes/,
    )
  })
})

test.each([
  ['(a', 'unclosed group'],
  ['a)', 'unmatched )'],
  ['[a', 'unclosed bracket'],
  ['[b-a]', 'range out of order'],
  ['*a', 'nothing to repeat'],
  ['a{3,2}', 'invalid count {3,2}'],
  ['(a)\\1', '\\1 is not supported'],
  ['\\p{Nope}', 'unknown property'],
  ['\\p{__proto__}', 'unknown property'],
  ['[[:constructor:]]', 'unknown property'],
  ['(?:a*)*', 'unbounded repetition of a pattern that can match'],
  ['(?:a{1000}){1000}{1000}', 'compiles to more than'],
  ['('.repeat(5000), 'nested too deeply'],
  [`a${'{1,2}'.repeat(5000)}`, 'too many repetition operators'],
  ['a|'.repeat(100_000), 'too long'],
  ['(?<=a+)b', 'lookbehind of variable length'],
  ['\\', 'unexpected end'],
])('rejects %s', (source, problem) => {
  expect(() => new Pattern(source)).toThrow(problem)
})
