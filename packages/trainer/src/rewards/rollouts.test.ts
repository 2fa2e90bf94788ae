import { join } from 'node:path'
import { backward, disposeModule, scope, setDefaultBackend, zeroGrad } from '@moe/core'
import { assertClose, tolerances } from '@moe/core/testing'
import { afterEach, beforeAll, describe, expect, test } from 'vitest'
import type { StepEvent } from '../events.ts'
import type { TokenBatch } from '../model.ts'
import type { TrainOptions } from '../options.ts'
import { readMetrics } from '../report/metrics-log.ts'
import { letters, removeTemporaryFolders, roundingBackend, TalkingBigram, temporaryFolder } from '../test-model.ts'
import { train } from '../train.ts'
import { evaluateRewards } from './evaluate-rewards.ts'
import { PackedTexts } from './packed-texts.ts'
import { advantagesOf, meanTerms, tokenWeights } from './policy-gradient.ts'
import { RolloutBatches } from './rollout-batches.ts'
import { rollouts, type Sample } from './rollouts.ts'
import { few, numbers, problem, prompts, type Ran, ran, sevens, usual } from './test-rollouts.ts'
import { TextRanks } from './text-ranks.ts'

const backend = roundingBackend()
beforeAll(() => setDefaultBackend(backend))
afterEach(async () => {
  await removeTemporaryFolders()
  expect(backend.stats().handles).toBe(0)
})

describe('a model that is rewarded for token 7', () => {
  test('learns to emit it, with the same numbers on every run', async () => {
    const first = await ran({}, { steps: 40 })
    const rewards = first.steps.map(({ metrics }) => metrics['reward'])
    expect(rewards[0]).toBeLessThan(0.2)
    expect(Math.min(...rewards.slice(-5))).toBeGreaterThan(0.6)
    expect(first.table[7][7]).toBeGreaterThan(0.6)
    const again = await ran({}, { steps: 40 })
    expect(numbers(again)).toEqual(numbers(first))
    expect(again.made).toEqual(first.made)
    const otherwise = await ran({}, { steps: 1, seed: 4 })
    expect(otherwise.made).not.toEqual(first.made.slice(0, 24))
  })

  test('learns faster from texts that it learns from several times, within the clip', async () => {
    const once = await ran({}, { steps: 10 })
    const often = await ran({ updates: 3 }, { steps: 30 })
    const last = (run: Ran) => run.steps.slice(-6).reduce((sum, { metrics }) => sum + metrics['reward'], 0)
    expect(last(often)).toBeGreaterThan(last(once))
    expect(often.made).toHaveLength(10 * 24)
    const clipped = often.steps.map(({ metrics }) => metrics['clipped'])
    // The first of three has the policy that made the texts.
    expect(clipped.filter((_, i) => i % 3 === 0).every(share => share === 0)).toBe(true)
    expect(clipped.some(share => share > 0)).toBe(true)
  })

  test('stays nearer to a reference for a larger KL weight', async () => {
    const kls: number[] = []
    for (const weight of [0.01, 1]) {
      const reference = new TalkingBigram()
      const { steps } = await ran({ kl: { weight, reference } }, { steps: 20 })
      expect(steps[0].metrics['kl']).toBeCloseTo(0, 10)
      kls.push(steps[19].metrics['kl'])
      disposeModule(reference)
    }
    expect(kls[1]).toBeLessThan(0.5 * kls[0])
    expect(kls[1]).toBeGreaterThan(0)
  })
})

describe('a step', () => {
  test('logs metrics of the texts', async () => {
    const samples: Sample[] = []
    const reward = (sample: Sample) => {
      samples.push(sample)
      return sample.tokens.length
    }
    const { steps, made } = await ran({ reward }, { steps: 1 })
    expect(samples.map(({ tokens }) => tokens)).toEqual(made)
    for (const { tokens, finishReason, text } of samples) {
      expect(finishReason).toBe(tokens[tokens.length - 1] === 11 ? 'stop' : 'length')
      expect(tokens.length).toBeLessThanOrEqual(5)
      expect(text).toBe('')
    }
    const lengths = made.map(({ length }) => length)
    const mean = (values: readonly number[]) => values.reduce((sum, x) => sum + x, 0) / values.length
    const { metrics, count, nll } = steps[0] as StepEvent & { count?: number }
    expect(metrics['reward']).toBeCloseTo(mean(lengths), 12)
    expect(metrics['textLength']).toBeCloseTo(mean(lengths), 12)
    expect(metrics['cutOff']).toBeCloseTo(
      mean(samples.map(({ finishReason }) => Number(finishReason === 'length'))),
      12,
    )
    expect(metrics['samplerKl']).toBeLessThan(1e-10)
    expect(metrics['entropy']).toBeGreaterThan(0)
    expect(nll).toBeGreaterThan(0)
    expect(count).toBeUndefined()
  })

  test('passes the original prompt and text without special tokens to the reward function', async () => {
    const asked = ['ab', 'cd'].map((text, answer) => ({ text, answer }))
    const seen = new Set<number>()
    const data = rollouts(asked, {
      ...few,
      reward: async ({ prompt, text, tokens }) => {
        await new Promise(resolve => setTimeout(resolve, tokens.length))
        expect(text).toBe(letters.decode?.(tokens))
        seen.add(prompt.answer)
        return 0
      },
    })
    const model = new TalkingBigram()
    await train(model, { ...usual, data, tokenizer: letters, steps: 1 })
    expect([...seen].sort()).toEqual([0, 1])
    disposeModule(model)
  })

  test('whose groups have equal rewards changes nothing', async () => {
    const untrained = new TalkingBigram()
    const before = await untrained.table()
    disposeModule(untrained)
    class Still extends TalkingBigram {
      override async afterStep() {
        return {}
      }
    }
    const { steps, table } = await ran({ reward: () => 3 }, { steps: 2 }, new Still())
    expect(table).toEqual(before)
    expect(steps.map(({ metrics }) => metrics['flatGroups'])).toEqual([1, 1])
    expect(steps.map(({ gradNorm }) => gradNorm)).toEqual([0, 0])
  })

  test('samples different texts for the same prompt, within and across steps', async () => {
    const data = rollouts([{ tokens: [10, 2] }], { reward: () => 0, groups: 1, groupSize: 12, maxTokens: 5 })
    const { made } = await ran({}, { data, steps: 2 })
    expect(made.slice(0, 12)).not.toEqual(made.slice(12))
    expect(new Set(made.map(String)).size).toBeGreaterThan(12)
  })

  test.each(['token', 'text'] as const)(
    'has the gradient of all texts, averaged by %s, and reads those that teach',
    async average => {
      const model = new TalkingBigram()
      const samples: Array<Sample & { reward: number }> = []
      const data = rollouts(prompts, {
        ...few,
        average,
        reward: sample => {
          const [, first] = (sample.prompt as { tokens: number[] }).tokens
          // Some groups are all alike.
          const reward = first < 3 ? 1 : sevens(sample) + sample.tokens.length
          samples.push({ ...sample, reward })
          return reward
        },
      })
      const rows = { sequenceLength: 12, batchSize: 3, isolate: true }
      const signal = new AbortController().signal
      const ranks = new TextRanks()
      const options = {
        ...rows,
        tokenizer: undefined,
        bos: undefined,
        seed: 1,
        precision: 'f32',
        signal,
        ranks,
      } as const
      const source = new RolloutBatches(model, data, options)
      const gradientOf = async (batches: readonly TokenBatch[]) => {
        const counts = batches.map(batch => scope(() => model.loss(batch).count))
        const total = counts.reduce((sum, count) => sum + count)
        for (const [i, batch] of batches.entries()) scope(() => backward(model.loss(batch).loss.mul(counts[i] / total)))
        const values = Array.from((await model.lm_head.weight.grad?.values()) ?? [])
        zeroGrad(model)
        return { values, total }
      }
      const own = await gradientOf((await source.batches(0)) ?? [])
      const all = prompts.flatMap(prompt => {
        const group = samples.filter(sample => sample.prompt === prompt)
        const advantages = advantagesOf(group.map(({ reward }) => reward))
        return group.map(({ tokens }, i) => ({ ids: prompt.tokens, tokens, advantage: advantages[i] }))
      })
      const packed = new PackedTexts(all, { ...rows, lookahead: 1 })
      const now = await packed.logProbs(model, 'f32')
      const odds = all.map(({ advantage }, i) => ({ advantage, now: now[i], old: now[i] }))
      const { weights, terms } = tokenWeights(odds, { clip: 0.2, klWeight: 0, average })
      const expected = await gradientOf(packed.weighted(weights))
      assertClose('gradient', own.values, expected.values, tolerances.gradient)
      expect(own.total).toBeLessThan(0.8 * expected.total)
      expect(source.metrics['objective']).toBeCloseTo(meanTerms(terms, expected.total).objective, 6)
      expect(source.metrics['flatGroups']).toBeGreaterThan(0)
      disposeModule(model)
    },
  )

  test('takes every prompt once an epoch', async () => {
    const asked: number[] = []
    const data = {
      groups: 2,
      groupSize: 2,
      reward: ({ prompt }: Sample) => asked.push((prompt as { tokens: number[] }).tokens[1]),
    }
    await ran(data, { steps: 5 })
    const epochs = [asked.slice(0, 10), asked.slice(10)]
    for (const epoch of epochs) expect(epoch.toSorted()).toEqual([1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    expect(epochs[0]).not.toEqual(epochs[1])
  })
})

describe('a run', () => {
  test.each([1, 3])('that was stopped goes on with the same numbers, %i updates', async updates => {
    const whole = await ran({ updates }, { steps: 12 })
    const out = join(await temporaryFolder(), 'run')
    const controller = new AbortController()
    const stopping: Partial<TrainOptions> = {
      steps: 12,
      out,
      signal: controller.signal,
      onEvent: event => event.type === 'step' && event.step === 4 && controller.abort(),
    }
    await ran({ updates }, stopping)
    const stopped = readMetrics(join(out, 'metrics.jsonl')).length
    // It finishes what it has made texts for.
    expect(stopped).toBe(updates === 1 ? 4 : 6)
    const rest = await ran({ updates }, { steps: 12, out, resume: true })
    expect(numbers(rest)).toEqual(numbers(whole).slice(stopped))
    expect(rest.table).toEqual(whole.table)
  })

  test('saves and evaluates only after complete rounds', async () => {
    const out = join(await temporaryFolder(), 'run')
    const options = { steps: 12, out, checkpointEvery: 4, keepCheckpoints: 9, evalEvery: 5 }
    const { events } = await ran({ updates: 3, validation: [{ tokens: [10, 9] }] }, options)
    const stepsOf = (type: string) =>
      events.flatMap(event => (event.type === type && 'step' in event ? event.step : []))
    expect(stepsOf('checkpoint')).toEqual([6, 9, 12])
    expect(stepsOf('evaluation')).toEqual([6, 12])
  })

  test('is refused by a checkpoint of other rollouts', async () => {
    const out = join(await temporaryFolder(), 'run')
    await ran({}, { steps: 2, out })
    const { code, message } = await problem(ran({ groupSize: 7 }, { steps: 2, out, resume: true }))
    expect(code).toBe('E_CHECKPOINT')
    expect(message).toContain('"groupSize":6')
    expect(message).toContain('"groupSize":7')
  })

  test('measures the reward of held-out prompts, as evaluateRewards does', async () => {
    const validation = Array.from({ length: 20 }, (_, i) => ({ tokens: [10, i % 10] }))
    const data = rollouts(prompts, { ...few, validation })
    const model = new TalkingBigram()
    const before = await evaluateRewards(model, data, { seed: usual.seed })
    const done: number[] = []
    const result = await train(model, {
      ...usual,
      data,
      steps: 30,
      onEvent: event => event.type === 'evaluating' && done.push(event.done),
    })
    const after = await evaluateRewards(model, data, { seed: usual.seed })
    expect(result.validation.reward).toBe(after.reward)
    expect(result.validation.tokens).toBe(after.tokens)
    expect(Number(after.reward)).toBeGreaterThan(Number(before.reward) + 0.3)
    expect(done).toEqual(Array.from({ length: 20 }, (_, i) => (i + 1) / 20))
    disposeModule(model)
  })

  test('shows progress lines', async () => {
    let text = ''
    const { progress } = await import('../report/progress.ts')
    const stream = { write: (part: string) => (text += part) } as never
    await ran({ validation: [{ tokens: [1] }] }, { steps: 2, progress: progress({ stream, color: false }) })
    expect(text).toMatch(/2 steps of 24 texts, 1\.6 epochs of 10\n/)
    expect(text).toMatch(/step 1\/2 {2}reward 0\.\d{3} {2}/)
    expect(text).toMatch(/step 2: held-out reward 0\.\d{3}, loss \d/)
  })
})
