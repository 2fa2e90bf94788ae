import { describe, expect, test } from 'vitest'
import { randomText } from '../../scripts/random-text.ts'
import { randomNumbers } from '../data/random.ts'
import { fillClasses } from '../unicode/pinned-classes.ts'
import { Pattern } from './pattern.ts'

fillClasses()

function find(source: string, text: string): string[] {
  const bytes = new TextEncoder().encode(text)
  const matches = new Pattern(source).matches(bytes, 0, bytes.length)
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
  return Array.from({ length: matches.length / 2 }, (_, i) =>
    decoder.decode(bytes.subarray(matches[2 * i], matches[2 * i + 1])),
  )
}

describe('agrees with RegExp', () => {
  // Only what means the same in both: no \s, \w or \p{L}, whose Unicode versions may differ.
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

test('possessive and atomic repetition gives nothing back', () => {
  expect(find('a++a', 'aaa')).toEqual([])
  expect(find('(?>a+)b', 'aab')).toEqual(['aab'])
  expect(find('a+a', 'aaa')).toEqual(['aaa'])
})

describe('nested repetition ends', () => {
  test('with the right answer where failures can be remembered', () => {
    expect(find('(?:a+)+$', `${'a'.repeat(5000)}b`)).toEqual([])
    expect(find('(?:a|a|aa)*c|.', 'a'.repeat(2000))).toHaveLength(2000)
    expect(find('\\s+$|\\s|b', `${' '.repeat(100_000)}b`)).toHaveLength(100_001)
    expect(find('(?:x*y*)z|x', 'xy'.repeat(10_000))).toHaveLength(10_000)
  })

  test('with an error where not', () => {
    expect(() => find('(?=\\s*b)c', `${' '.repeat(200_000)}b`)).toThrow(
      /takes more than \d+ steps on a text of 200001 bytes/,
    )
  })
})

test.each([
  ['(a', 'a group is not closed'],
  ['a)', 'unmatched )'],
  ['[a', 'a bracket is not closed'],
  ['[b-a]', 'a range is out of order'],
  ['*a', 'nothing to repeat'],
  ['a{3,2}', 'repeats 3 to 2 times'],
  ['(a)\\1', '\\1 is not supported'],
  ['\\p{Nope}', 'unknown property'],
  ['\\p{__proto__}', 'unknown property'],
  ['[[:constructor:]]', 'unknown property'],
  ['(?:a*)*', 'repeats without end what can match nothing'],
  ['(?:a{1000}){1000}{1000}', 'repeats too much'],
  ['('.repeat(5000), 'nested too deep'],
  [`a${'{1,2}'.repeat(5000)}`, 'repetitions are nested too deep'],
  ['a|'.repeat(100_000), 'too long'],
  ['(?<=a+)b', 'lookbehind of changing length'],
  ['\\', 'ends too early'],
])('refuses %s', (source, problem) => {
  expect(() => new Pattern(source)).toThrow(problem)
})
