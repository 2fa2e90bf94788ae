/** @file Reasoning and calls in the parts of a text, compared with the whole text, wherever its parts end. */
import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { type Thinking, thinkingAfter, withReasoning } from './reasoning.ts'
import { partialMatch, type ScoredToken, type TextPart } from './text-parts.ts'
import { withCalls } from './tool-calls.ts'

/** A text in random parts, some of them empty, or in single characters, with a token for each character. */
async function* split(text: string, random?: Random): AsyncGenerator<TextPart> {
  for (let at = 0; at < text.length; ) {
    const end = Math.min(text.length, at + (random?.integer(5) ?? 1))
    const tokens = Array.from({ length: end - at }, (_, i): ScoredToken => {
      return { id: at + i, score: null, offset: at + i, isEnd: false }
    })
    yield { text: text.slice(at, end), tokens }
    at = end
  }
}

async function joined(parts: AsyncIterable<TextPart>) {
  const all: TextPart[] = []
  for await (const part of parts) all.push(part)
  return {
    text: all.map(({ text }) => text).join(''),
    reasoning: all.map(({ reasoning }) => reasoning).join(''),
    tokens: all.flatMap(({ tokens }) => tokens ?? []),
    calls: all.flatMap(({ calls }) => calls ?? []),
    parts: all,
  }
}

describe('reasoning', () => {
  const texts = [
    '<think>so it is</think>\n\nYes.',
    ' \n<think>\n a <b> </th </think Mr. </think> \n<think>b</think>',
    '<think></think>a',
    '<think> \n</think> \n',
    '<think>it was not over </thi',
    '<think>over \n',
    'No <think>a</think>',
    '<thinking>',
    ' <thin',
    ' ',
    '</think>',
    '',
  ]

  /** What a whole text consists of. */
  function expectedOf(text: string, thinking: Thinking): readonly [reasoning: string, answer: string] {
    const rest = thinking === 'open' ? text : /^\s*<think>([\s\S]*)$/.exec(text)?.[1]
    if (rest === undefined) return ['', text]
    const [, before = rest, answer = ''] = /^([\s\S]*?)<\/think>\s*([\s\S]*)$/.exec(rest) ?? []
    return [before.trim(), answer]
  }

  test.each<Thinking>(['open', 'optional'])('is separated from the answer, wherever parts end: %s', async thinking => {
    for (const text of texts) {
      for (let seed = 0; seed < 20; seed++) {
        const found = await joined(withReasoning(split(text, new Random(seed)), thinking))
        expect([found.reasoning, found.text], JSON.stringify(text)).toEqual(expectedOf(text, thinking))
        expect(found.tokens.map(({ id }) => id)).toEqual(Array.from(text, (_, i) => i))
        for (const { text, reasoning, tokens } of found.parts)
          expect(text !== '' || reasoning !== '' || tokens?.length).toBeTruthy()
      }
    }
  })

  test('and the answer are passed on without delay, and their tokens are told apart', async () => {
    const { parts, tokens } = await joined(withReasoning(split('<think>a b</think>\n!?'), 'optional'))
    expect(parts.flatMap(({ reasoning }) => reasoning ?? [])).toEqual(['a', ' b'])
    expect(parts.flatMap(({ text }) => text || [])).toEqual(['!', '?'])
    expect(tokens.map(({ of }) => of)).toEqual([...new Array(19).fill('reasoning'), undefined, undefined])
    const direct = await joined(withReasoning(split('<<!?'), 'optional'))
    expect(direct.parts.map(({ text }) => text)).toEqual(['<<', '!', '?'])
    expect(direct.tokens.map(({ of }) => of)).toEqual(new Array(4).fill(undefined))
  })

  test('can start inside the prompt, or in the answer if the template mentions it', () => {
    expect(thinkingAfter('a<think>\n', false)).toBe('open')
    expect(thinkingAfter('a<think></think>\n', true)).toBe('none')
    expect(thinkingAfter('a', true)).toBe('optional')
    expect(thinkingAfter('a', false)).toBe('none')
  })
})

test('calls are withheld from their marker on, wherever parts end', async () => {
  const calls = [{ name: 'a', arguments: '{}' }]
  for (const [text, onlyAtStart, before, isCall] of [
    ['so <<call>x', false, 'so <', true],
    ['<call>x', true, '', true],
    [' <call>x', true, ' <call>x', false],
    ['<cal', false, '<cal', false],
    ['so <call>nothing', false, 'so <call>nothing', false],
    ['', false, '', false],
  ] as const) {
    const read = (held: string) => (held === '<call>x' ? calls : [])
    for (let seed = 0; seed < 20; seed++) {
      const found = await joined(withCalls(split(text, new Random(seed)), { begin: '<call>', onlyAtStart, read }))
      expect([found.text, found.calls], text).toEqual([before, isCall ? calls : []])
      expect(found.tokens.map(({ id }) => id)).toEqual(Array.from(text, (_, i) => i))
      for (const { id, of } of found.tokens) if (!isCall || id < before.length) expect(of).toBeUndefined()
      if (isCall) expect(found.tokens.at(-1)?.of).toBe('calls')
    }
  }
})

test('the length of a partial match is that of the longest beginning at the end of a text', () => {
  expect(['', 'a', 'ab', 'xaab', 'aba', 'abac', 'xb'].map(text => partialMatch(text, 'abac'))).toEqual([
    0, 1, 2, 2, 3, 0, 0,
  ])
})
