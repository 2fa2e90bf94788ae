import { expect, test } from 'vitest'
import { type GenerationTask, tasks } from './index.ts'
import { matcherOf } from './match.ts'

const { matches } = tasks.gsm8k as GenerationTask
const gsm8k = (name: string, text: string, answer: string) =>
  matcherOf(name, matches?.[`exact_match,${name}`] ?? {})(text, [answer], {})

test.each([
  [' 3 + 4 = 7\n#### 7', '… so\n#### 7', 1, 1],
  ['The answer is $1,234.', 'a\n#### 1,234', 0, 1],
  ['#### 1,234 dollars, not 5', '#### 1234', 1, 0],
  ['#### -12', '#### -12', 1, 1],
  ['#### 7.', '#### 7', 1, 1],
  ['no number', '#### 7', 0, 0],
  ['#### 5 and 6', '#### 6', 0, 1],
  ['It is 7.', '#### 7', 0, 1],
  // As in the harness, only one of several full stops after a number is removed.
  ['It is 7...', '#### 7', 0, 0],
])(
  'GSM8K: the text %j with the answer %j has strict-match %i and flexible-extract %i',
  (text, answer, strict, flexible) => {
    expect([gsm8k('strict-match', text, answer), gsm8k('flexible-extract', text, answer)]).toEqual([strict, flexible])
  },
)

test('a match ignores surrounding white space, and case and punctuation if set', () => {
  const match = (options: object, text: string, ...answers: string[]) => matcherOf('m', options)(text, answers, {})
  expect(match({}, ' Paris\n', 'Paris')).toBe(1)
  expect(match({}, 'paris', 'Paris')).toBe(0)
  expect(match({}, 'b', 'a', 'b')).toBe(1)
  expect(match({ ignore: ['\\$'] }, '$ 5', '5')).toBe(1)
  expect(match({ ignoreCase: true, ignorePunctuation: true }, 'PARIS!', "Pa'ris.")).toBe(1)
  expect(match({ extract: 'is (\\w+)|(\\d+)', pick: 'last' }, 'it is a, or 7', '7')).toBe(1)
  expect(match({ extract: '\\d+' }, '5 or 7', '5')).toBe(1)
  expect(matcherOf('m', text => text.length / 4)('abc', [], {})).toBe(0.75)
  expect(() => matcherOf('m', { extract: '(' })).toThrow(/m: Invalid regular expression/)
})
