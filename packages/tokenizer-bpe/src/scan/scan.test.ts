/**
 * @file Compares the hand-written scanners with the regular expressions that they implement, on random difficult texts.
 */
import { describe, expect, test } from 'vitest'
import { randomText } from '../../scripts/random-text.ts'
import { registerAll } from '../all-features.ts'
import { randomNumbers } from '../data/random.ts'
import { feature } from '../features.ts'
import { compilePreTokenizer } from '../json/pre-tokenizer.ts'
import { readSteps, runSteps } from '../json/pre-tokenizer-steps.ts'
import { preTokenizerJson, preTokenizerNames } from '../pre-tokenizers.ts'
import { GPT2_PATTERN } from './gpt2.ts'

registerAll()

describe.each(preTokenizerNames())('%s', name => {
  const { scanner, patterns, digits } = feature(name)
  const steps = readSteps(preTokenizerJson(patterns.length === 0 ? [GPT2_PATTERN] : patterns, digits))

  test('is recognized in a tokenizer.json', () => {
    expect(compilePreTokenizer(preTokenizerJson(patterns, digits)).name).toBe(name)
  })

  test('is not confused with another of the same length', () => {
    const other = JSON.stringify(preTokenizerJson([patterns[0] ?? GPT2_PATTERN, ...patterns.slice(1)], digits))
    expect(compilePreTokenizer(JSON.parse(other.replace('p{N}', 'p{P}').replace('[\\r\\n]', '[\\r\\t]'))).name).toBe(
      'steps',
    )
  })

  test('splits 3,000 random texts as its patterns do', () => {
    const random = randomNumbers(7)
    const ends = new Int32Array(5)
    for (let i = 0; i < 3000; i++) {
      const text = randomText(random, 20, ['<|x|>'])
      const bytes = new TextEncoder().encode(text)
      const expected = [...runSteps(steps, bytes, 0, bytes.length, true).ends]
      const found: number[] = []
      for (let pos = 0; pos < bytes.length; pos = found[found.length - 1]) {
        found.push(...ends.subarray(0, scanner(bytes, pos, bytes.length, ends)))
      }
      expect(found, JSON.stringify(text)).toEqual(expected)
    }
  })
})
