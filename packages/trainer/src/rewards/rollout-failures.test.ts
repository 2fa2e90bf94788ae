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
import { few, numbers, problem, prompts, ran, sevens, usual } from './test-rollouts.ts'

const backend = roundingBackend()
beforeAll(() => setDefaultBackend(backend))
afterEach(async () => {
  await removeTemporaryFolders()
  expect(backend.stats().handles).toBe(0)
})

describe('what goes wrong', () => {
  const failing = async (reward: RolloutOptions['reward']) => {
    const out = join(await temporaryFolder(), 'run')
    const told = await problem(ran({ reward }, { steps: 6, out }))
    return { ...told, out }
  }

  /** Rewards as usual for two steps, of 24 texts each. */
  const twoStepsThen = (then: () => unknown): RolloutOptions['reward'] => {
    let count = 0
    return ((sample: Sample) => (count++ < 48 ? sevens(sample) : then())) as RolloutOptions['reward']
  }

  const bad: ReadonlyArray<readonly [then: () => unknown, told: RegExp]> = [
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
  test.each(bad)('a reward of %s is told, and what was learned stays', async (then, expected) => {
    const { code, message, out } = await failing(twoStepsThen(then))
    expect(code).toBe('E_DATA')
    expect(message).toMatch(expected)
    expect(latestCheckpoint(out)).toMatch(/step-000002$/)
    const whole = await ran({}, { steps: 6 })
    const rest = await ran({}, { steps: 6, out, resume: true })
    expect(numbers(rest)).toEqual(numbers(whole).slice(2))
  })

  test('a reward that fails for a held-out prompt leaves a checkpoint, too', async () => {
    const out = join(await temporaryFolder(), 'run')
    const reward = (sample: Sample) => {
      if ((sample.prompt as { tokens: number[] }).tokens[1] === 9) throw new Error('cannot judge')
      return sevens(sample)
    }
    const given = { reward, validation: [{ tokens: [10, 9] }] }
    expect(await problem(ran(given, { steps: 6, evalEvery: 4, out }))).toMatchObject({ code: 'E_DATA' })
    expect(latestCheckpoint(out)).toMatch(/step-000004$/)
  })

  test('a slow reward is stopped by the signal, and the step is repeated', async () => {
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
    const data = rollouts(prompts, { ...few, reward })
    const onEvent = (event: TrainEvent) => {
      if (event.type === 'step') latest = event.step
    }
    const result = await train(model, { ...usual, ...options, data, onEvent })
    disposeModule(model)
    expect(result.stopped).toBe('interrupted')
    expect(result.steps).toBe(2)
    const rest = await ran({}, { steps: 5, out, resume: true })
    expect(numbers(rest)).toEqual(numbers(await ran({}, { steps: 5 })).slice(2))
  })

  test('the first failing text is reported, and the others are stopped', async () => {
    let asked = 0
    let ended = 0
    const reward: RolloutOptions['reward'] = (_, { signal }) => {
      if (++asked === 5) throw new Error('the fifth')
      return new Promise((_, reject) => {
        signal.addEventListener('abort', () => {
          ended++
          reject(new Error('another'))
        })
      })
    }
    expect(await problem(ran({ reward }))).toMatchObject({
      code: 'E_DATA',
      message: expect.stringContaining('the fifth'),
    })
    expect(ended).toBe(asked - 1)
  })

  test('a reward that never resolves and ignores the signal is not awaited', async () => {
    const controller = new AbortController()
    const reward = () => {
      controller.abort()
      return new Promise<number>(() => {})
    }
    const { events } = await ran({ reward }, { signal: controller.signal })
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
  ])('%o is refused', (given, expected) => {
    const make = () => rollouts(prompts, { ...few, ...(given as object) })
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
  ])('prompts %o are refused', (given, expected) => {
    const make = () => rollouts(given as unknown as Prompt[], few)
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
  ] as const)('training with %o is refused', async (options, code, expected) => {
    expect(await problem(ran({ updates: 2 }, options))).toMatchObject({
      code,
      message: expect.stringContaining(expected),
    })
  })

  test('a row that exactly fits a text is enough', async () => {
    await ran({}, { sequenceLength: 6, steps: 1 })
  })

  test('models that cannot sample are refused with what is missing', async () => {
    const silent = new BigramModel() as TalkingBigram
    expect(await problem(ran({}, {}, silent))).toMatchObject({
      code: 'E_ATTR',
      message: expect.stringContaining('continuousBatch'),
    })
    class Deaf extends TalkingBigram {
      override loss(batch: TokenBatch, options = {}): LossOutput {
        const { nlls, ...output } = super.loss(batch, options)
        return output
      }
    }
    expect(await problem(ran({}, {}, new Deaf()))).toMatchObject({
      code: 'E_ATTR',
      message: expect.stringContaining('does not return the likelihood of each token'),
    })
    const texts = rollouts([{ text: 'ab' }], few)
    expect(await problem(ran({}, { data: texts }))).toMatchObject({
      code: 'E_CONFIG',
      message: expect.stringContaining('no tokenizer'),
    })
    const data = rollouts(prompts, few)
    const model = new TalkingBigram()
    expect(await problem(evaluateRewards(model, data))).toMatchObject({ code: 'E_DATA' })
    disposeModule(model)
  })
})
