import { join } from 'node:path'
import { disposeModule, setDefaultBackend } from '@moe/core'
import { afterEach, beforeAll, describe, expect, test } from 'vitest'
import { latestCheckpoint } from '../checkpoints/checkpoint-folder.ts'
import type { TrainEvent } from '../events.ts'
import type { LossOutput, TokenBatch } from '../model.ts'
import type { TrainOptions } from '../options.ts'
import { BigramModel, removeTemporaryFolders, roundingBackend, TalkingBigram, temporaryFolder } from '../test-model.ts'
import { train } from '../train.ts'
import { evaluateRewards } from './evaluate-rewards.ts'
import { type Prompt, type RolloutOptions, rollouts, type Sample } from './rollouts.ts'
import { errorOf, fewRollouts, numbers, prompts, run, settings, sevens } from './test-rollouts.ts'

const backend = roundingBackend()
beforeAll(() => setDefaultBackend(backend))
afterEach(async () => {
  await removeTemporaryFolders()
  expect(backend.stats().handles).toBe(0)
})

describe('rollouts', () => {
  const failing = async (reward: RolloutOptions['reward']) => {
    const out = join(await temporaryFolder(), 'run')
    const error = await errorOf(run({ reward }, { steps: 6, out }))
    return { ...error, out }
  }

  /** A reward function that calls `then` after two steps of 24 texts. */
  const twoStepsThen = (then: () => unknown): RolloutOptions['reward'] => {
    let count = 0
    return ((sample: Sample) => (count++ < 48 ? sevens(sample) : then())) as RolloutOptions['reward']
  }

  const bad: ReadonlyArray<readonly [then: () => unknown, message: RegExp]> = [
    [() => Number.NaN, /the reward of a text of \d tokens, "" is NaN; return a finite number/],
    [() => Number.POSITIVE_INFINITY, /is Infinity/],
    [() => '1', /is of type string/],
    [() => undefined, /is of type undefined/],
    [() => Promise.reject(new Error('no such server')), /failed: no such server; catch errors in the reward function/],
    [
      () => {
        throw new TypeError('x is not a function')
      },
      /failed: x is not a function/,
    ],
  ]
  test.each(bad)('fail with the reward of %s, but keep the steps before', async (then, expected) => {
    const { code, message, out } = await failing(twoStepsThen(then))
    expect(code).toBe('E_DATA')
    expect(message).toMatch(expected)
    expect(latestCheckpoint(out)).toMatch(/step-000002$/)
    const whole = await run({}, { steps: 6 })
    const rest = await run({}, { steps: 6, out, resume: true })
    expect(numbers(rest)).toEqual(numbers(whole).slice(2))
  })

  test('save a checkpoint if the reward of a held-out prompt fails', async () => {
    const out = join(await temporaryFolder(), 'run')
    const reward = (sample: Sample) => {
      if ((sample.prompt as { tokens: number[] }).tokens[1] === 9) throw new Error('cannot judge')
      return sevens(sample)
    }
    const options = { reward, validation: [{ tokens: [10, 9] }] }
    expect(await errorOf(run(options, { steps: 6, evalEvery: 4, out }))).toMatchObject({ code: 'E_DATA' })
    expect(latestCheckpoint(out)).toMatch(/step-000004$/)
  })

  test('stop pending rewards when interrupted, and repeat the step when resumed', async () => {
    const out = join(await temporaryFolder(), 'run')
    const controller = new AbortController()
    const reward: RolloutOptions['reward'] = (sample, { signal }) =>
      latest < 2
        ? sevens(sample)
        : new Promise((_, reject) => {
            signal.addEventListener('abort', () => reject(signal.reason))
            controller.abort()
          })
    let latest = 0
    const options: Partial<TrainOptions> = { steps: 5, out, signal: controller.signal }
    const model = new TalkingBigram()
    const data = rollouts(prompts, { ...fewRollouts, reward })
    const onEvent = (event: TrainEvent) => {
      if (event.type === 'step') latest = event.step
    }
    const result = await train(model, { ...settings, ...options, data, onEvent })
    disposeModule(model)
    expect(result.stopped).toBe('interrupted')
    expect(result.steps).toBe(2)
    const rest = await run({}, { steps: 5, out, resume: true })
    expect(numbers(rest)).toEqual(numbers(await run({}, { steps: 5 })).slice(2))
  })

  test('report the first failing reward, and abort the others', async () => {
    let calls = 0
    let aborted = 0
    const reward: RolloutOptions['reward'] = (_, { signal }) => {
      if (++calls === 5) throw new Error('the fifth')
      return new Promise((_, reject) => {
        signal.addEventListener('abort', () => {
          aborted++
          reject(new Error('another'))
        })
      })
    }
    expect(await errorOf(run({ reward }))).toMatchObject({
      code: 'E_DATA',
      message: expect.stringContaining('the fifth'),
    })
    expect(aborted).toBe(calls - 1)
  })

  test('do not wait for a reward that ignores the signal', async () => {
    const controller = new AbortController()
    const reward = () => {
      controller.abort()
      return new Promise<number>(() => {})
    }
    const { events } = await run({ reward }, { signal: controller.signal })
    expect(events.at(-1)).toMatchObject({ type: 'end', result: { stopped: 'interrupted', steps: 0 } })
  })

  test.each([
    [{ reward: undefined }, 'reward is undefined, expected a function'],
    [{ groupSize: 1 }, 'groupSize is 1, expected an integer of at least 2, to compare'],
    [{ groups: 0 }, 'groups is 0'],
    [{ maxTokens: 1.5 }, 'maxTokens is 1.5'],
    [{ clip: 0 }, 'clip is 0'],
    [{ clip: [0.2] }, 'clip is [0.2]'],
    [{ average: 'texts' }, "average is texts, expected 'token' or 'text'"],
    [{ kl: { weight: 0.1 } }, 'kl is invalid, expected { weight, reference }'],
    [{ groupsize: 4 }, 'unknown option groupsize; did you mean groupSize?'],
    [{ template: {} }, 'expected an object with a method render'],
  ])('reject the options %o', (options, expected) => {
    const make = () => rollouts(prompts, { ...fewRollouts, ...(options as object) })
    expect(make).toThrow(expect.objectContaining({ code: 'E_CONFIG', message: expect.stringContaining(expected) }))
  })

  test.each([
    [[], 'there are no prompts'],
    ['abc', 'the prompts are a single string'],
    [[{ tokens: [1] }, 'abc'], 'prompt 1 is "abc"'],
    [[{ tokens: [] }], 'prompt 0 is empty'],
    [[{ text: '' }], 'prompt 0 is empty'],
    [[{ text: 'a', tokens: [1] }], 'has none or several'],
    [[{ answer: 3 }], 'has none or several'],
    [[{ messages: [] }], 'prompt 0 has no valid messages'],
    [[{ messages: [{ role: 'user', content: 'a' }] }], 'prompt 0 consists of messages, but no template is given'],
  ])('reject the prompts %o', (invalid, expected) => {
    const make = () => rollouts(invalid as unknown as Prompt[], fewRollouts)
    expect(make).toThrow(expect.objectContaining({ code: 'E_DATA', message: expect.stringContaining(expected) }))
  })

  test.each([
    [
      { sequenceLength: 5 },
      'E_DATA',
      'prompt 0 has 2 tokens and does not fit into a row of 5 with a text of maxTokens = 5; pass a sequenceLength of 6',
    ],
    [{ steps: 7 }, 'E_CONFIG', 'steps is 7, expected a multiple of the 2 updates'],
    [{ accumulate: 2 }, 'E_CONFIG', 'accumulate is given together with rollouts'],
    [{ eos: 3 }, 'E_CONFIG', 'eos is given together with rollouts'],
    [
      { world: 2 },
      'E_CONFIG',
      'world is 2 without ranks, but processes can share rollouts only if they train together',
    ],
    [{ isolate: true }, 'E_CONFIG', 'isolates documents that share a row'],
  ] as const)('reject training with %o', async (options, code, expected) => {
    expect(await errorOf(run({ updates: 2 }, options))).toMatchObject({
      code,
      message: expect.stringContaining(expected),
    })
  })

  test('accept rows that exactly fit a text', async () => {
    await run({}, { sequenceLength: 6, steps: 1 })
  })

  test('reject models that cannot sample or return no likelihoods, and data without a tokenizer or held-out prompts', async () => {
    const silent = new BigramModel() as TalkingBigram
    expect(await errorOf(run({}, {}, silent))).toMatchObject({
      code: 'E_ATTR',
      message: expect.stringContaining('continuousBatch'),
    })
    class WithoutNlls extends TalkingBigram {
      override loss(batch: TokenBatch, options = {}): LossOutput {
        const { nlls, ...output } = super.loss(batch, options)
        return output
      }
    }
    expect(await errorOf(run({}, {}, new WithoutNlls()))).toMatchObject({
      code: 'E_ATTR',
      message: expect.stringContaining('does not return the likelihood of each token'),
    })
    const texts = rollouts([{ text: 'ab' }], fewRollouts)
    expect(await errorOf(run({}, { data: texts }))).toMatchObject({
      code: 'E_CONFIG',
      message: expect.stringContaining('no tokenizer'),
    })
    const data = rollouts(prompts, fewRollouts)
    const model = new TalkingBigram()
    expect(await errorOf(evaluateRewards(model, data))).toMatchObject({ code: 'E_DATA' })
    disposeModule(model)
  })
})
