import { join } from 'node:path'
import { backward, disposeModule, scope, setDefaultBackend, zeroGrad } from '@moe/core'
import { assertClose, tolerances } from '@moe/core/testing'
import { afterEach, beforeAll, describe, expect, test } from 'vitest'
import type { StepEvent } from '../events.ts'
import type { TokenBatch } from '../model.ts'
import type { TrainOptions } from '../options.ts'
import { RankGroup } from '../rank-group.ts'
import { readMetrics } from '../report/metrics-log.ts'
import { letters, removeTemporaryFolders, roundingBackend, TalkingBigram, temporaryFolder } from '../test-model.ts'
import { train } from '../train.ts'
import { evaluateRewards } from './evaluate-rewards.ts'
import { PackedTexts } from './packed-texts.ts'
import { advantagesOf, meanTerms, tokenWeights } from './policy-gradient.ts'
import { RolloutBatches } from './rollout-batches.ts'
import { rollouts, type Sample } from './rollouts.ts'
import { errorOf, fewRollouts, numbers, prompts, type RolloutRun, run, settings, sevens } from './test-rollouts.ts'

const backend = roundingBackend()
beforeAll(() => setDefaultBackend(backend))
afterEach(async () => {
  await removeTemporaryFolders()
  expect(backend.stats().handles).toBe(0)
})

describe('a model that is rewarded for token 7', () => {
  test('learns to generate it, with the same results in every run', async () => {
    const first = await run({}, { steps: 40 })
    const rewards = first.steps.map(({ metrics }) => metrics['reward'])
    expect(rewards[0]).toBeLessThan(0.2)
    expect(Math.min(...rewards.slice(-5))).toBeGreaterThan(0.6)
    expect(first.table[7][7]).toBeGreaterThan(0.6)
    const second = await run({}, { steps: 40 })
    expect(numbers(second)).toEqual(numbers(first))
    expect(second.sampledTexts).toEqual(first.sampledTexts)
    const other = await run({}, { steps: 1, seed: 4 })
    expect(other.sampledTexts).not.toEqual(first.sampledTexts.slice(0, 24))
  })

  test('learns faster from several updates with the same texts, within the clip range', async () => {
    const once = await run({}, { steps: 10 })
    const often = await run({ updates: 3 }, { steps: 30 })
    const last = (run: RolloutRun) => run.steps.slice(-6).reduce((sum, { metrics }) => sum + metrics['reward'], 0)
    expect(last(often)).toBeGreaterThan(last(once))
    expect(often.sampledTexts).toHaveLength(10 * 24)
    const clipped = often.steps.map(({ metrics }) => metrics['clipped'])
    // In the first of three updates, the policy is the one that sampled the texts.
    expect(clipped.filter((_, i) => i % 3 === 0).every(share => share === 0)).toBe(true)
    expect(clipped.some(share => share > 0)).toBe(true)
  })

  test('stays closer to a reference with a larger KL weight', async () => {
    const kls: number[] = []
    for (const weight of [0.01, 1]) {
      const reference = new TalkingBigram()
      const { steps } = await run({ kl: { weight, reference } }, { steps: 20 })
      expect(steps[0].metrics['kl']).toBeCloseTo(0, 10)
      kls.push(steps[19].metrics['kl'])
      disposeModule(reference)
    }
    expect(kls[1]).toBeLessThan(0.5 * kls[0])
    expect(kls[1]).toBeGreaterThan(0)
  })
})

describe('a training step', () => {
  test('logs metrics of the texts', async () => {
    const samples: Sample[] = []
    const reward = (sample: Sample) => {
      samples.push(sample)
      return sample.tokens.length
    }
    const { steps, sampledTexts } = await run({ reward }, { steps: 1 })
    expect(samples.map(({ tokens }) => tokens)).toEqual(sampledTexts)
    for (const { tokens, finishReason, text } of samples) {
      expect(finishReason).toBe(tokens[tokens.length - 1] === 11 ? 'stop' : 'length')
      expect(tokens.length).toBeLessThanOrEqual(5)
      expect(text).toBe('')
    }
    const lengths = sampledTexts.map(({ length }) => length)
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
    const texts = ['ab', 'cd'].map((text, answer) => ({ text, answer }))
    const seen = new Set<number>()
    const data = rollouts(texts, {
      ...fewRollouts,
      reward: async ({ prompt, text, tokens }) => {
        await new Promise(resolve => setTimeout(resolve, tokens.length))
        expect(text).toBe(letters.decode?.(tokens))
        seen.add(prompt.answer)
        return 0
      },
    })
    const model = new TalkingBigram()
    await train(model, { ...settings, data, tokenizer: letters, steps: 1 })
    expect([...seen].sort()).toEqual([0, 1])
    disposeModule(model)
  })

  test('changes no weights if the rewards within each group are equal', async () => {
    const untrained = new TalkingBigram()
    const before = await untrained.table()
    disposeModule(untrained)
    class Still extends TalkingBigram {
      override async afterStep() {
        return {}
      }
    }
    const { steps, table } = await run({ reward: () => 3 }, { steps: 2 }, new Still())
    expect(table).toEqual(before)
    expect(steps.map(({ metrics }) => metrics['flatGroups'])).toEqual([1, 1])
    expect(steps.map(({ gradNorm }) => gradNorm)).toEqual([0, 0])
  })

  test('samples different texts for the same prompt, within and across steps', async () => {
    const data = rollouts([{ tokens: [10, 2] }], { reward: () => 0, groups: 1, groupSize: 12, maxTokens: 5 })
    const { sampledTexts } = await run({}, { data, steps: 2 })
    expect(sampledTexts.slice(0, 12)).not.toEqual(sampledTexts.slice(12))
    expect(new Set(sampledTexts.map(String)).size).toBeGreaterThan(12)
  })

  test.each(['token', 'text'] as const)(
    'has the gradient of all texts, averaged by %s, but processes only groups with different rewards',
    async average => {
      const model = new TalkingBigram()
      const samples: Array<Sample & { reward: number }> = []
      const data = rollouts(prompts, {
        ...fewRollouts,
        average,
        reward: sample => {
          const [, first] = (sample.prompt as { tokens: number[] }).tokens
          // Some groups have equal rewards.
          const reward = first < 3 ? 1 : sevens(sample) + sample.tokens.length
          samples.push({ ...sample, reward })
          return reward
        },
      })
      const rows = { sequenceLength: 12, batchSize: 3, isolate: true }
      const signal = new AbortController().signal
      const ranks = new RankGroup()
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

  test('uses every prompt once per epoch', async () => {
    const rewarded: number[] = []
    const data = {
      groups: 2,
      groupSize: 2,
      reward: ({ prompt }: Sample) => rewarded.push((prompt as { tokens: number[] }).tokens[1]),
    }
    await run(data, { steps: 5 })
    const epochs = [rewarded.slice(0, 10), rewarded.slice(10)]
    for (const epoch of epochs) expect(epoch.toSorted()).toEqual([1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    expect(epochs[0]).not.toEqual(epochs[1])
  })
})

describe('a training run', () => {
  test.each([1, 3])('resumes bit for bit after an interruption, %i updates', async updates => {
    const whole = await run({ updates }, { steps: 12 })
    const out = join(await temporaryFolder(), 'run')
    const controller = new AbortController()
    const stopping: Partial<TrainOptions> = {
      steps: 12,
      out,
      signal: controller.signal,
      onEvent: event => event.type === 'step' && event.step === 4 && controller.abort(),
    }
    await run({ updates }, stopping)
    const stopped = readMetrics(join(out, 'metrics.jsonl')).length
    // It completes all updates with the sampled texts.
    expect(stopped).toBe(updates === 1 ? 4 : 6)
    const rest = await run({ updates }, { steps: 12, out, resume: true })
    expect(numbers(rest)).toEqual(numbers(whole).slice(stopped))
    expect(rest.table).toEqual(whole.table)
  })

  test('saves and evaluates only after complete rounds', async () => {
    const out = join(await temporaryFolder(), 'run')
    const options = { steps: 12, out, checkpointEvery: 4, keepCheckpoints: 9, evalEvery: 5 }
    const { events } = await run({ updates: 3, validation: [{ tokens: [10, 9] }] }, options)
    const stepsOf = (type: string) =>
      events.flatMap(event => (event.type === type && 'step' in event ? event.step : []))
    expect(stepsOf('checkpoint')).toEqual([6, 9, 12])
    expect(stepsOf('evaluation')).toEqual([6, 12])
  })

  test('cannot resume from a checkpoint with other rollout options', async () => {
    const out = join(await temporaryFolder(), 'run')
    await run({}, { steps: 2, out })
    const { code, message } = await errorOf(run({ groupSize: 7 }, { steps: 2, out, resume: true }))
    expect(code).toBe('E_CHECKPOINT')
    expect(message).toContain('"groupSize":6')
    expect(message).toContain('"groupSize":7')
  })

  test('takes the prompts that follow if it resumes with other numbers of groups and updates', async () => {
    const out = join(await temporaryFolder(), 'run')
    const seen = new Map<string, number>()
    const reward = (sample: Sample) => {
      const prompt = JSON.stringify(sample.prompt)
      seen.set(prompt, (seen.get(prompt) ?? 0) + 1)
      return sevens(sample)
    }
    await run({ reward, groups: 1 }, { steps: 2, out })
    await run({ reward, groups: 3, updates: 2 }, { steps: 4, out, resume: true, allowChanges: true })
    expect([...seen.values()]).toEqual(prompts.map(() => fewRollouts.groupSize))
  })

  test('evaluates the reward of held-out prompts like evaluateRewards', async () => {
    const validation = Array.from({ length: 20 }, (_, i) => ({ tokens: [10, i % 10] }))
    const data = rollouts(prompts, { ...fewRollouts, validation })
    const model = new TalkingBigram()
    const before = await evaluateRewards(model, data, { seed: settings.seed })
    const done: number[] = []
    const result = await train(model, {
      ...settings,
      data,
      steps: 30,
      onEvent: event => event.type === 'evaluating' && done.push(event.done),
    })
    const after = await evaluateRewards(model, data, { seed: settings.seed })
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
    await run({ validation: [{ tokens: [1] }] }, { steps: 2, progress: progress({ stream, color: false }) })
    expect(text).toMatch(/2 steps of 24 texts, 1\.6 epochs of 10\n/)
    expect(text).toMatch(/step 1\/2 {2}reward 0\.\d{3} {2}/)
    expect(text).toMatch(/step 2: held-out reward 0\.\d{3}, loss \d/)
  })
})
