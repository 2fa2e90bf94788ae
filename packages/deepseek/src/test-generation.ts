/** @file For tests: generated texts, compared with forward passes of whole texts without a cache. */
import { fromHost } from '@moe/core'
import { expect } from 'vitest'
import type { DeepSeek, Generation } from './index.ts'

export async function read(text: Generation<number>): Promise<number[]> {
  const ids: number[] = []
  for await (const id of text) ids.push(id)
  return ids
}

/** Prompts for a vocabulary of 40 tokens. One begins with another. */
export const prompts = [
  [3, 7, 11, 2, 30, 8, 1],
  [4, 9],
  [3, 7, 11, 2, 30, 8, 1, 39, 20, 21, 22, 6, 17],
]

/** The logits `[T, vocabulary]` of a text, one row after another. */
async function logitsOf(model: DeepSeek, ids: readonly number[]): Promise<Float32Array> {
  using input = fromHost(Int32Array.from(ids), [1, ids.length], 'i32', model.backend)
  using logits = model.infer(() => model.forward(input))
  return (await logits.values()) as Float32Array
}

/** The most likely continuation, computed without a cache. */
export async function withoutCache(model: DeepSeek, prompt: readonly number[], count: number): Promise<number[]> {
  const ids = [...prompt]
  for (let i = 0; i < count; i++) {
    const last = (await logitsOf(model, ids)).subarray(-model.config.vocab_size)
    ids.push(last.indexOf(Math.max(...last)))
  }
  return ids.slice(prompt.length)
}

/** Expects the texts of `generate` and of a batch to be those of forward passes without a cache. */
export async function expectTextsWithoutCache(model: DeepSeek, speculative: boolean): Promise<void> {
  const expected: number[][] = []
  for (const prompt of prompts) expected.push(await withoutCache(model, prompt, 12))
  for (const [i, prompt] of prompts.entries()) {
    const text = model.generate(prompt, { maxTokens: 12, speculative })
    expect(await read(text)).toEqual(expected[i])
    if (speculative) expect(text.stats.accepted[0]).toBeGreaterThan(0)
  }
  const batch = model.continuousBatch({ speculative, prefillChunkSize: 5 })
  expect(await Promise.all(prompts.map(prompt => read(batch.generate(prompt, { maxTokens: 12 }))))).toEqual(expected)
  batch.dispose()
}

/** The log-probabilities of all tokens of a text but the first, by `score` and by a forward pass. */
export async function scoresOf(model: DeepSeek, ids: readonly number[]) {
  const { vocab_size: width } = model.config
  const values = await logitsOf(model, ids)
  const expected = ids.slice(1).map((id, i) => {
    const row = Array.from(values.subarray(i * width, (i + 1) * width))
    return row[id] - Math.log(row.reduce((sum, x) => sum + Math.exp(x), 0))
  })
  const [scores] = await model.score([ids])
  return { found: scores.slice(1).map(each => (each as { logProb: number }).logProb), expected }
}
