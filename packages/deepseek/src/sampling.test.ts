import { readFile } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { Random, scope, setDefaultBackend, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { describe, expect, test } from 'vitest'
import { DeepSeek, type Generation, loadWeights, presets, type TurnOptions } from './index.ts'
import { verifyDraft } from './next-tokens.ts'
import { Occurrences, processLogits } from './process-logits.ts'
import { restrict, type SamplingOptions, sample, scoresOf } from './sampling.ts'
import { read } from './test-generation.ts'
import { makeDraftsAgree, tiny } from './test-tiny.ts'

const backend = referenceBackend()
setDefaultBackend(backend)

/** Probabilities of the logits at a temperature of more than 0. */
async function probabilities(logits: Float32Array, temperature: number): Promise<Float32Array> {
  using scores = scope(() => scoresOf(tensor(logits), { temperature }))
  return (await scores.values()) as Float32Array
}

const total = (p: Float32Array) => p.reduce((sum, x) => sum + x, 0)
const rounded = (p: Float32Array) => Array.from(p, x => Math.round(1e6 * x) / 1e6)

describe('the distribution of the next token', () => {
  // Probabilities 0.4, 0.3, 0.2, 0.1, not in order.
  const logits = Float32Array.of(Math.log(2), Math.log(4), Math.log(1), Math.log(3))
  const distribution = async ({ temperature = 1, ...options }: SamplingOptions) => {
    const p = restrict(await probabilities(logits, temperature), options)
    return rounded(p.map(x => x / total(p)))
  }

  test('follows the temperature', async () => {
    expect(await distribution({})).toEqual([0.2, 0.4, 0.1, 0.3])
    // Squared and normalized.
    expect(await distribution({ temperature: 0.5 })).toEqual([4, 16, 1, 9].map(x => Math.round(1e6 * (x / 30)) / 1e6))
    // Logits divided by this temperature exceed f32.
    expect(
      rounded(
        await probabilities(
          logits.map(x => 1e20 * x),
          1e-25,
        ),
      ),
    ).toEqual([0, 1, 0, 0])
  })

  test('topP keeps the smallest set with that probability, minP the tokens with that share of the most likely', async () => {
    expect(await distribution({ topP: 0.35 })).toEqual([0, 1, 0, 0])
    expect(await distribution({ topP: 0.6 })).toEqual([0, 0.571429, 0, 0.428571])
    expect(await distribution({ topP: 0.85 })).toEqual([0.222222, 0.444444, 0, 0.333333])
    expect(await distribution({ minP: 0.6 })).toEqual([0, 0.571429, 0, 0.428571])
    expect(await distribution({ minP: 0.6, topP: 0.3 })).toEqual([0, 1, 0, 0])
  })

  const restrictions: SamplingOptions[] = [{}, { topK: 3, topP: 0.6 }, { topK: 3, minP: 0.3 }]
  test.each(restrictions)(
    'verifyDraft accepts or replaces drafts so that tokens are distributed as without drafts: %o',
    async options => {
      const all = await probabilities(logits, 1)
      const p = restrict(all.slice(), options)
      const sum = total(p)
      for (const draft of [0, 1, 2]) {
        const random = new Random(draft + 1)
        const counts = [0, 0, 0, 0]
        let accepted = 0
        for (let i = 0; i < 20_000; i++) {
          const verified = verifyDraft(all.slice(), draft, options, random)
          counts[verified.token]++
          if (verified.accepted) accepted++
          if (verified.accepted !== (verified.token === draft))
            throw new Error(`${verified.token} in place of ${draft}`)
        }
        // Within four standard deviations of a share in 20,000 draws.
        for (const [i, n] of counts.entries()) {
          const share = p[i] / sum
          expect(Math.abs(n / 20_000 - share)).toBeLessThanOrEqual(4 * Math.sqrt((share * (1 - share)) / 20_000))
        }
        expect(accepted).toBe(counts[draft])
      }
    },
  )

  test('topK keeps the most likely tokens, of equals the first, and topP is a share of the rest', async () => {
    expect(await distribution({ topK: 1 })).toEqual([0, 1, 0, 0])
    expect(await distribution({ topK: 3 })).toEqual([0.222222, 0.444444, 0, 0.333333])
    expect(await distribution({ topK: 50 })).toEqual([0.2, 0.4, 0.1, 0.3])
    // 0.4 is less than half of all, and more than half of 0.4 and 0.3.
    expect(await distribution({ topP: 0.5 })).toEqual([0, 0.571429, 0, 0.428571])
    expect(await distribution({ topK: 2, topP: 0.5 })).toEqual([0, 1, 0, 0])
    expect(await distribution({ topK: 3, minP: 0.6 })).toEqual([0, 0.571429, 0, 0.428571])
    expect(rounded(restrict(Float32Array.of(1, 2, 2, 2, 1), { topK: 2 }))).toEqual([0, 2, 2, 0, 0])
    expect(rounded(restrict(Float32Array.of(1, 2, 2, 2, 1), { topK: 2, minP: 1 }))).toEqual([0, 2, 2, 0, 0])
    expect(rounded(restrict(Float32Array.of(1, 2, 0, 0, 0), { topK: 4 }))).toEqual([1, 2, 0, 0, 0])
  })

  test('topP and topK of many tokens keep the same set as after sorting all tokens', async () => {
    for (const [seed, spread] of [0.1, 1, 3, 12].entries()) {
      const random = new Random(seed)
      const many = random.normal(1000).map(x => Math.round(spread * 8 * x) / 8)
      const all = await probabilities(many, 1)
      const sum = total(all)
      const order = Array.from(all.keys()).sort((a, b) => all[b] - all[a] || a - b)
      for (const topP of [0.01, 0.3, 0.9, 0.999]) {
        let mass = 0
        const set = order.filter(i => {
          mass += all[i]
          return mass - all[i] < topP * sum
        })
        const kept = Array.from(restrict(all.slice(), { topP }), (p, i) => (p > 0 ? i : -1))
        expect(kept.filter(i => i >= 0)).toEqual(set.toSorted((a, b) => a - b))
        for (const minP of [0.001, 0.1, 1]) {
          const both = restrict(all.slice(), { topP, minP })
          expect(Array.from(both, p => p > 0)).toEqual(
            Array.from(all, (p, i) => set.includes(i) && p >= minP * all[order[0]]),
          )
        }
      }
      for (const topK of [1, 2, 30, 999, 1000, 5000]) {
        const largest = order.slice(0, topK)
        const share = 0.7 * largest.reduce((sum, i) => sum + all[i], 0)
        let mass = 0
        const set = largest.filter(i => {
          mass += all[i]
          return mass - all[i] < share
        })
        const positive = (p: Float32Array) => Array.from(p.keys()).filter(i => p[i] > 0)
        const sorted = (tokens: number[]) => tokens.filter(i => all[i] > 0).toSorted((a, b) => a - b)
        expect(positive(restrict(all.slice(), { topK }))).toEqual(sorted(largest))
        expect(positive(restrict(all.slice(), { topK, topP: 0.7 }))).toEqual(sorted(set))
        expect(positive(restrict(all.slice(), { topK, topP: 0.7, minP: 0.1 }))).toEqual(
          sorted(set.filter(i => all[i] >= 0.1 * all[order[0]])),
        )
      }
    }
  })
})

describe('compared with transformers (tools/reference/sampling.py)', async () => {
  interface Fixture {
    prompt: number[]
    logits: number[]
    cases: { options: SamplingOptions; probabilities: number[] }[]
    texts: { repetitionPenalty: number; made: number[] }[]
  }
  const path = (name: string) => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url))
  const { prompt, logits, cases, texts }: Fixture = JSON.parse(await readFile(path('sampling.json'), 'utf8'))

  test.each(cases)('has the same probabilities: $options', async ({ options, probabilities: expected }) => {
    using scores = scope(() => scoresOf(tensor(logits), options))
    const penalized = processLogits((await scores.values()) as Float32Array, new Occurrences(prompt, options), options)
    const p = restrict(penalized as Float32Array, options)
    const sum = total(p)
    for (const [i, x] of p.entries()) expect(Math.abs(x / sum - expected[i])).toBeLessThan(1e-6)
    expect(Array.from(p, x => x > 0)).toEqual(expected.map(x => x > 0))
  })

  test.each(texts)(
    'generates the same text with a repetition penalty of $repetitionPenalty, with and without drafts',
    async ({ made, repetitionPenalty }) => {
      const config = JSON.parse(await readFile(path('v3-mtp/config.json'), 'utf8'))
      const model = new DeepSeek({ ...config, eos_token_id: null }, { seed: null })
      await loadWeights(model, path('v3-mtp'))
      for (const speculative of [true, false]) {
        const ids: number[] = []
        const options = { maxTokens: made.length, repetitionPenalty, speculative }
        for await (const id of model.generate(prompt, options)) ids.push(id)
        expect(ids).toEqual(made)
      }
      model.dispose()
    },
  )
})

describe('logit bias, frequency and presence penalties', () => {
  const cases: SamplingOptions[] = [
    { frequencyPenalty: 1.5 },
    { presencePenalty: 0.7 },
    { frequencyPenalty: -0.3, presencePenalty: 1.2, logitBias: { 3: 1.5, 17: -100, 39: 0.25 } },
  ]

  test("follow the definition in OpenAI's documentation", () => {
    const prompt = [5, 5, 9]
    const generated = [1, 4, 1, 9, 1, 4]
    const logits = new Random(3).normal(40)
    for (const options of cases) {
      const { frequencyPenalty = 0, presencePenalty = 0, logitBias = {} } = options
      const expected = Array.from(logits, (logit, token) => {
        const count = generated.filter(one => one === token).length
        return logit + (logitBias[token] ?? 0) - count * frequencyPenalty - (count > 0 ? presencePenalty : 0)
      })
      const occurrences = new Occurrences(prompt, options)
      for (const token of generated) occurrences.add(token)
      const largest = Math.max(...expected)
      const temperature = 0.7
      const p = processLogits(logits.slice(), occurrences, { ...options, temperature }) as Float32Array
      for (const [i, x] of p.entries()) expect(x).toBeCloseTo(Math.exp((expected[i] - largest) / temperature), 5)
      expect(processLogits(logits.slice(), occurrences, options)).toBe(expected.indexOf(largest))
    }
  })

  test('apply before and after the repetition penalty, as in vLLM', () => {
    const options = { temperature: 1, repetitionPenalty: 2, frequencyPenalty: 0.5, presencePenalty: 0.25 }
    const biased = { ...options, logitBias: { 0: 2, 1: -3 } }
    const occurrences = new Occurrences([0, 1], biased)
    occurrences.add(1)
    // (2 + 2) / 2, (1 - 3) * 2 - 0.75, and a token that does not occur.
    const p = processLogits(Float32Array.of(2, 1, 2), occurrences, biased) as Float32Array
    expect(rounded(p)).toEqual(rounded(Float32Array.of(1, Math.exp(-6.75), 1)))
  })

  test.each([false, true])(
    'choose the token with the highest adjusted log-probability of the scored text (drafts: %s)',
    async speculative => {
      const model = new DeepSeek(
        { ...tiny, num_nextn_predict_layers: 2, max_position_embeddings: 256, eos_token_id: null },
        { seed: 2 },
      )
      makeDraftsAgree(model)
      const session = model.session({ speculative })
      const batch = model.continuousBatch({ speculative })
      let accepted = 0
      const counted = async (text: Generation<number>) => {
        const ids = await read(text)
        accepted += text.stats.accepted.reduce((sum, n) => sum + n, 0)
        return ids
      }
      const prompt = [3, 7, 11, 3, 3]
      const plain = await counted(model.generate(prompt, { maxTokens: 30 }))
      expect(accepted).toBe(0)
      const together = await Promise.all(
        cases.map(options => counted(batch.generate(prompt, { ...options, maxTokens: 30 }))),
      )
      for (const [i, options] of cases.entries()) {
        const made = await counted(session.generate(prompt, { ...options, maxTokens: 30 }))
        expect(together[i]).toEqual(made)
        expect(made).not.toEqual(plain)
        const [scored] = await model.score([[...prompt, ...made]], { top: 40 })
        const { frequencyPenalty = 0, presencePenalty = 0, logitBias = {} } = options
        const counts = new Map<number, number>()
        for (const [t, token] of made.entries()) {
          const rank = (one: number, logProb: number) => {
            const count = counts.get(one) ?? 0
            return logProb + (logitBias[one] ?? 0) - count * frequencyPenalty - (count > 0 ? presencePenalty : 0)
          }
          const ranks = (scored[prompt.length + t]?.top ?? []).map(one => [rank(one.token, one.logProb), one.token])
          const best = ranks.reduce((most, one) => (one[0] > most[0] ? one : most))
          expect(token).toBe(best[1])
          counts.set(token, (counts.get(token) ?? 0) + 1)
        }
      }
      if (speculative) expect(accepted).toBeGreaterThan(20)
      batch.dispose()
      session.dispose()
      model.dispose()
    },
  )

  test('can force or exclude a token', async () => {
    const model = new DeepSeek({ ...tiny, eos_token_id: null }, { seed: 2 })
    const made = async (logitBias: Record<number, number>) => {
      const ids: number[] = []
      for await (const id of model.generate([1, 2], { maxTokens: 20, temperature: 1, seed: 4, logitBias })) ids.push(id)
      return ids
    }
    expect(new Set(await made({ 12: 100 }))).toEqual(new Set([12]))
    const [likeliest] = await made({})
    expect(await made({ [likeliest]: -100 })).not.toContain(likeliest)
    model.dispose()
  })
})

test('a model whose logits are NaN fails instead of generating a token that may be excluded', async () => {
  const handles = backend.stats().handles
  const model = new DeepSeek(tiny, { seed: 1 })
  const { weight } = model.model.norm
  weight.assign(model.infer(() => weight.mul(Number.NaN)))
  const batch = model.continuousBatch()
  const constraint = { allowed: () => Int32Array.of(0b1000), accept() {} }
  for (const options of [
    { temperature: 1 },
    { temperature: 1, topK: 4, topP: 0.5 },
    { temperature: 1, constraint },
    { repetitionPenalty: 1.1 },
  ]) {
    const error = { code: 'E_NAN', message: expect.stringMatching(/the scores of the next token are NaN/) }
    await expect(read(model.generate([1, 2], options))).rejects.toMatchObject(error)
    await expect(read(batch.generate([1, 2], options))).rejects.toMatchObject(error)
  }
  batch.dispose()
  model.dispose()
  expect(backend.stats().handles).toBe(handles)
})

test.each([1e-320, 1e-30, 1e30, Number.MAX_VALUE])(
  'repetition penalties beyond the numbers of f32 give no NaN: %d',
  async repetitionPenalty => {
    const model = new DeepSeek(tiny, { seed: 1 })
    const all = Array.from({ length: tiny.vocab_size as number }, (_, id) => id)
    for (const temperature of [0, 1]) {
      const ids = await read(model.generate(all, { repetitionPenalty, temperature, maxTokens: 3 }))
      expect(ids).toHaveLength(3)
    }
    model.dispose()
  },
)

test('an abort between tokens ends generation and frees its memory', async () => {
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
    for await (const id of model.generate([1, 2], { signal: abort.signal, maxTokens: 50 })) {
      if (made.push(id) === 3) abort.abort(new Error('enough'))
    }
  }
  await expect(run()).rejects.toMatchObject({ code: 'E_ABORTED', cause: { message: 'enough' } })
  expect(made).toHaveLength(3)
  model.dispose()
  expect(backend.stats().handles).toBe(handles)
})

test('timers run between tokens, also on a synchronous backend, and can end generation', async () => {
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
  expect(() => model.generate([1], { maxTokens: -1 })).toThrow(/expected a whole number for maxTokens, got -1/)
  model.dispose()
})

test('greedy decoding chooses the most likely token, the lowest of equals, and accepts drafts that equal it', async () => {
  using best = scope(() => scoresOf(tensor([-1, 3, 2, 3, 5, 1, 0, 4], [2, 4]), {}))
  expect(best.shape).toEqual([2, 1])
  const [first, second] = await best.values()
  expect([first, second]).toEqual([1, 0])
  const random = new Random(1)
  expect(sample(first, {}, random)).toBe(1)
  expect(verifyDraft(first, 1, {}, random)).toEqual({ token: 1, accepted: true })
  expect(verifyDraft(first, 3, {}, random)).toEqual({ token: 1, accepted: false })
})

describe('a padded vocabulary', () => {
  // The tokenizer has 7 of the 40 ids, so that a random model would often generate others.
  const tokenizer = { vocabSize: 7, createDecodeStream: () => ({ push: (id: number) => `${id},`, end: () => '' }) }
  const samplings: TurnOptions[] = [
    {},
    { temperature: 1.5, seed: 1 },
    { temperature: 1.5, seed: 1, topK: 20, topP: 0.9 },
    { repetitionPenalty: 1.3 },
    { temperature: 1, repetitionPenalty: 1.3, seed: 2 },
    { temperature: 1, frequencyPenalty: 0.5, logitBias: { 3: 2, 20: 100 }, seed: 2 },
  ]
  const textOf = async (text: AsyncIterable<string>) => {
    let all = ''
    for await (const part of text) all += part
    return all
  }
  const idsOf = async (text: AsyncIterable<string>) => (await textOf(text)).split(',').slice(0, -1).map(Number)

  test.each([false, true])(
    'ids without text are not generated, but log-probabilities include them (drafts: %s)',
    async speculative => {
      const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { seed: 2 })
      const session = model.session({ speculative })
      const batch = model.continuousBatch({ speculative })
      const turn = { maxTokens: 25, logProbs: 3 }
      const whole = batch.generate([3, 4], { ...turn, temperature: 1.5 })
      const made = samplings.map(sampling => batch.generate([1, 2], { ...sampling, ...turn, tokenizer }))
      const [together] = await Promise.all([Promise.all(made.map(idsOf)), read(whole)])
      expect(Math.max(...whole.logProbs.map(({ token }) => token))).toBeGreaterThan(6)
      for (const [i, sampling] of samplings.entries()) {
        const alone = model.generate([1, 2], { ...sampling, ...turn, tokenizer, speculative })
        const ids = await idsOf(alone)
        expect(ids).toHaveLength(25)
        expect(Math.max(...ids)).toBeLessThan(7)
        expect(together[i]).toEqual(ids)
        expect(await idsOf(session.generate([1, 2], { ...sampling, ...turn, tokenizer }))).toEqual(ids)
        // Log-probabilities are those over the complete vocabulary.
        const [scored] = await model.score([[1, 2, ...ids]], { top: 3 })
        for (const { logProbs } of [alone, made[i]]) {
          expect(logProbs.map(({ token, top }) => [token, top.map(({ token }) => token)])).toEqual(
            scored.slice(2).map(one => [one?.token, one?.top.map(({ token }) => token)]),
          )
        }
        expect(alone.logProbs.some(({ top }) => top[0].token >= 7)).toBe(true)
      }
      batch.dispose()
      session.dispose()
      model.dispose()
    },
  )

  test('the most likely token with text is chosen', async () => {
    const model = new DeepSeek(tiny, { seed: 2 })
    const ids = await idsOf(model.generate([1, 2], { maxTokens: 1, tokenizer }))
    const [scored] = await model.score([[1, 2, 0]], { top: 40 })
    expect(ids).toEqual([scored[2]?.top.find(({ token }) => token < 7)?.token])
    model.dispose()
  })
})
