import { Random, setDefaultBackend, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { describe, expect, test } from 'vitest'
import { likeliest } from './decode-step.ts'
import { DeepSeek, presets } from './index.ts'
import { acceptOrDraw, distribution, type SamplingOptions, sample, verifyDraft } from './sampling.ts'

const backend = referenceBackend()
setDefaultBackend(backend)

describe('the distribution of the next token', () => {
  // Probabilities 0.4, 0.3, 0.2, 0.1, not in order.
  const logits = Float32Array.of(Math.log(2), Math.log(4), Math.log(1), Math.log(3))
  const of = (options: SamplingOptions) => Array.from(distribution(logits, options), x => Math.round(1e6 * x) / 1e6)

  test('follows the temperature', () => {
    expect(of({ temperature: 1 })).toEqual([0.2, 0.4, 0.1, 0.3])
    // Squared and normalized.
    expect(of({ temperature: 0.5 })).toEqual([4, 16, 1, 9].map(x => Math.round(1e6 * (x / 30)) / 1e6))
  })

  test('topP keeps the smallest set that reaches it, minP what has that share of the likeliest', () => {
    expect(of({ temperature: 1, topP: 0.35 })).toEqual([0, 1, 0, 0])
    expect(of({ temperature: 1, topP: 0.6 })).toEqual([0, 0.571429, 0, 0.428571])
    expect(of({ temperature: 1, topP: 0.85 })).toEqual([0.222222, 0.444444, 0, 0.333333])
    expect(of({ temperature: 1, minP: 0.6 })).toEqual([0, 0.571429, 0, 0.428571])
    expect(of({ temperature: 1, minP: 0.6, topP: 0.3 })).toEqual([0, 1, 0, 0])
  })

  test('a drafted token is kept or replaced so that the result is distributed as without a draft', () => {
    const p = distribution(logits, { temperature: 1 })
    for (const draft of [0, 1, 2]) {
      const random = new Random(draft + 1)
      const counts = [0, 0, 0, 0]
      let accepted = 0
      for (let i = 0; i < 20_000; i++) {
        const made = acceptOrDraw(p, draft, random)
        counts[made.token]++
        if (made.accepted) accepted++
        expect(made.accepted).toBe(made.token === draft)
      }
      // Four deviations of a share among 20,000 draws.
      for (const [i, n] of counts.entries()) {
        expect(Math.abs(n / 20_000 - p[i])).toBeLessThan(4 * Math.sqrt((p[i] * (1 - p[i])) / 20_000))
      }
      expect(accepted).toBe(counts[draft])
    }
  })

  test('topP of many tokens is the same set as by sorting all of them', () => {
    for (const [seed, spread] of [0.1, 1, 3, 12].entries()) {
      const random = new Random(seed)
      const many = random.normal(1000).map(x => Math.round(spread * 8 * x) / 8)
      const all = distribution(many, { temperature: 1 })
      const order = Array.from(all.keys()).sort((a, b) => all[b] - all[a] || a - b)
      for (const topP of [0.01, 0.3, 0.9, 0.999]) {
        let mass = 0
        const set = order.filter(i => {
          mass += all[i]
          return mass - all[i] < topP
        })
        const kept = Array.from(distribution(many, { temperature: 1, topP }), (p, i) => (p > 0 ? i : -1))
        expect(kept.filter(i => i >= 0)).toEqual(set.sort((a, b) => a - b))
      }
    }
  })
})

test('an abort between tokens ends generation and frees what it held', async () => {
  const handles = backend.stats().handles
  const model = new DeepSeek({
    ...presets.tiny,
    vocab_size: 32,
    hidden_size: 16,
    num_hidden_layers: 1,
    eos_token_id: null,
  })
  const abort = new AbortController()
  const made: number[] = []
  const run = async () => {
    for await (const id of model.generate([1, 2], { signal: abort.signal, maxTokens: 50, speculative: false })) {
      if (made.push(id) === 3) abort.abort(new Error('enough'))
    }
  }
  await expect(run()).rejects.toMatchObject({ code: 'E_ABORTED', cause: { message: 'enough' } })
  expect(made).toHaveLength(3)
  model.dispose()
  expect(backend.stats().handles).toBe(handles)
})

test('timers run between tokens, also on a backend that never waits, and can end generation', async () => {
  const model = new DeepSeek({
    ...presets.tiny,
    vocab_size: 32,
    hidden_size: 16,
    num_hidden_layers: 1,
    eos_token_id: null,
  })
  const abort = new AbortController()
  setTimeout(() => abort.abort())
  const run = async () => {
    for await (const _ of model.generate([1], { signal: abort.signal, maxTokens: 2000, temperature: 5 }));
  }
  await expect(run()).rejects.toMatchObject({ code: 'E_ABORTED' })
  expect(() => model.generate([1], { maxTokens: -1 })).toThrow(/maxTokens = -1 is no number of tokens/)
  model.dispose()
})

test('greedy: the likeliest token, the lowest of equals, and drafts stand if they are it', async () => {
  const best = likeliest(tensor([-1, 3, 2, 3, 5, 1, 0, 4], [2, 4]))
  expect(best.shape).toEqual([2, 1])
  const [first, second] = await best.values()
  expect([first, second]).toEqual([1, 0])
  const random = new Random(1)
  expect(sample(first, {}, random)).toBe(1)
  expect(verifyDraft(first, 1, {}, random)).toEqual({ token: 1, accepted: true })
  expect(verifyDraft(first, 3, {}, random)).toEqual({ token: 1, accepted: false })
})
