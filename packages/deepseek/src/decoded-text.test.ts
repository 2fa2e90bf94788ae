import { expect, test } from 'vitest'
import { decodedText } from './decoded-text.ts'

test.each([
  { pieces: ['a', '', 'b'], end: 'c', stops: ['x'], texts: ['a', 'b', 'c'], isStopped: false },
  { pieces: ['<s>', 'a'], end: '', stops: ['<s>'], texts: [], isStopped: true },
  { pieces: ['a<', 's', '>b', 'c'], end: '', stops: ['x', '<s>'], texts: ['a'], isStopped: true },
  { pieces: ['a<', 's', 'b'], end: '', stops: ['<s>'], texts: ['a', '<sb'], isStopped: false },
  { pieces: ['a<s'], end: '', stops: ['<s>'], texts: ['a', '<s'], isStopped: false },
  { pieces: ['a<s'], end: '>b', stops: ['<s>'], texts: ['a'], isStopped: true },
  { pieces: ['a12b'], end: '', stops: ['2', '12'], texts: ['a'], isStopped: true },
])('$pieces, then $end, with the stop strings $stops: $texts', async ({ pieces, end, stops, texts, isStopped }) => {
  const ids = async function* () {
    yield* pieces.keys()
  }
  const tokenizer = { createDecodeStream: () => ({ push: (id: number) => pieces[id], end: () => end }) }
  let stopped = 0
  const found: string[] = []
  for await (const text of decodedText(ids(), tokenizer, stops, () => stopped++)) found.push(text)
  expect(found).toEqual(texts)
  expect(stopped).toBe(isStopped ? 1 : 0)
})
