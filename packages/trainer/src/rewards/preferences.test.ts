import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { backward, disposeModule, scope, setDefaultBackend, tensor } from '@moe/core'
import { assertClose } from '@moe/core/testing'
import fc from 'fast-check'
import { afterEach, beforeAll, describe, expect, test } from 'vitest'
import type { Conversation } from '../data/conversations.ts'
import type { StepEvent, TrainEvent } from '../events.ts'
import type { TrainOptions } from '../options.ts'
import { RankGroup } from '../rank-group.ts'
import { BigramModel, letters, removeTemporaryFolders, roundingBackend, temporaryFolder } from '../test-model.ts'
import { train } from '../train.ts'
import { PreferenceBatches, pairTerm } from './preference-batches.ts'
import { type Preference, type PreferenceOptions, preferences } from './preferences.ts'

const backend = roundingBackend()
beforeAll(() => setDefaultBackend(backend))
afterEach(async () => {
  await removeTemporaryFolders()
  expect(backend.stats().handles).toBe(0)
})

interface Weights {
  readonly embed: number[][]
  readonly head: number[][]
}

interface Fixture {
  readonly policy: Weights
  readonly reference: Weights
  readonly pairs: Array<{ readonly prompt: number[]; readonly chosen: number[]; readonly rejected: number[] }>
  readonly cases: Array<
    Weights & {
      readonly beta: number
      readonly chosen: number[]
      readonly rejected: number[]
      readonly losses: number[]
    }
  >
}

const fixture: Fixture = JSON.parse(await readFile(new URL('../../fixtures/dpo.json', import.meta.url), 'utf8'))

function modelOf({ embed, head }: Weights): BigramModel {
  const model = new BigramModel()
  scope(() => {
    model.embed_tokens.weight.assign(tensor(embed.flat(), model.embed_tokens.weight.shape))
    model.lm_head.weight.assign(tensor(head.flat(), model.lm_head.weight.shape))
  })
  return model
}

test.each(fixture.cases)('losses, rewards and gradients equal those of PyTorch, beta $beta', async expected => {
  const [model, reference] = [modelOf(fixture.policy), modelOf(fixture.reference)]
  const pairs = fixture.pairs.map(({ prompt, ...texts }) => ({ tokens: prompt, ...texts }))
  const data = preferences(pairs, { reference, beta: expected.beta, pairs: pairs.length, validation: pairs })
  const rows = {
    sequenceLength: 20,
    batchSize: 2,
    isolate: true,
    seed: 1,
    precision: 'f32',
    ranks: new RankGroup(),
  } as const
  const source = new PreferenceBatches(model, data, { ...rows, tokenizer: undefined, bos: undefined })
  const batches = await source.batches(0)
  const total = pairs.reduce((sum, { chosen, rejected }) => sum + chosen.length + rejected.length, 0)
  for (const batch of batches) {
    scope(() => {
      const { loss, count } = model.loss(batch)
      backward(loss.mul(count / total))
    })
  }
  const meanOf = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / pairs.length
  const mean = meanOf(expected.losses)
  expect(source.metrics['preference']).toBeCloseTo(mean, 5)
  for (const side of ['chosen', 'rejected'] as const)
    expect(source.metrics[side]).toBeCloseTo(meanOf(expected[side]), 4)
  for (const [name, { weight }] of [
    ['embed', model.embed_tokens],
    ['head', model.lm_head],
  ] as const) {
    const values = await weight.grad?.values()
    assertClose(name, values ?? [], expected[name].flat(), { relative: 1e-5, absolute: 1e-6 })
    weight.zeroGrad()
  }
  const evaluation = await source.evaluate({
    limit: Number.POSITIVE_INFINITY,
    signal: new AbortController().signal,
    onProgress: done => expect(done).toBe(1),
  })
  expect(evaluation?.loss).toBeCloseTo(mean, 5)
  expect(evaluation?.preferred).toBe(expected.losses.filter(loss => loss < Math.LN2).length / pairs.length)
  expect(evaluation?.tokens).toBe(total)
  for (const each of [model, reference]) disposeModule(each)
})

test('the weight of a pair is the negative slope of the loss, and both are finite for any margin', () => {
  const odds = fc.double({ min: -500, max: 0, noNaN: true })
  const pair = fc.record({ chosen: odds, rejected: odds })
  const h = 1e-5
  fc.assert(
    fc.property(pair, pair, fc.constantFrom(0.01, 0.1, 3), (now, reference, beta) => {
      const { loss, margin, weight } = pairTerm(now, reference, beta)
      const at = (by: number) => pairTerm({ ...now, chosen: now.chosen + by }, reference, beta).loss
      expect(weight).toBeCloseTo((at(-h) - at(h)) / (2 * h), 5)
      expect(loss).toBeGreaterThanOrEqual(0)
      if (Math.abs(margin) > 1e-9) expect(loss < Math.LN2).toBe(margin > 0)
    }),
  )
  expect(pairTerm({ chosen: -1e6, rejected: 0 }, { chosen: 0, rejected: -1e6 }, 1)).toMatchObject({
    loss: 2e6,
    weight: 1,
  })
  expect(pairTerm({ chosen: 0, rejected: -1e6 }, { chosen: -1e6, rejected: 0 }, 1)).toMatchObject({
    loss: 0,
    weight: 0,
  })
})

/** Pairs whose chosen text contains a 7. */
const sevens: Preference[] = Array.from({ length: 12 }, (_, i) => ({
  tokens: [10, i % 6],
  chosen: [7, i % 5, 11],
  rejected: [8, i % 4, 11],
}))

async function run(preferenceOptions: Partial<PreferenceOptions> = {}, options: Partial<TrainOptions> = {}) {
  const [model, reference] = [new BigramModel(), new BigramModel()]
  const steps: StepEvent[] = []
  try {
    const data = preferences(sevens, { reference, pairs: 4, ...preferenceOptions })
    const settings = { data, steps: 10, batchSize: 4, sequenceLength: 8, lr: 0.05, seed: 2, progress: false } as const
    const onEvent = (event: TrainEvent) => event.type === 'step' && steps.push(event)
    const result = await train(model, { ...settings, onEvent, ...options })
    return { result, steps: steps.map(({ tokensPerSecond, ...rest }) => rest) }
  } finally {
    disposeModule(model)
    disposeModule(reference)
  }
}

describe('training on preferences', () => {
  test('starts from a loss of ln 2, and learns to prefer the chosen texts, also held-out ones', async () => {
    const { steps, result } = await run({ validation: 0.25 }, { steps: 30 })
    expect(steps[0].metrics['preference']).toBeCloseTo(Math.LN2, 6)
    expect(steps[29].metrics['preference']).toBeLessThan(0.55)
    expect(steps[29].metrics['preferred']).toBe(1)
    expect(result.validation.preferred).toBe(1)
    expect(result.validation.loss).toBeLessThan(0.6)
  })

  test('stays closer to the reference for a larger beta', async () => {
    const margin = async (beta: number) =>
      Number((await run({ beta }, { steps: 40 })).steps[39].metrics['margin']) / beta
    expect(await margin(2)).toBeLessThan(await margin(0.05))
  })

  test('resumes with the same losses', async () => {
    const uninterrupted = await run()
    const out = join(await temporaryFolder(), 'run')
    const controller = new AbortController()
    const onEvent = (event: TrainEvent) => {
      if (event.type === 'step' && event.step === 4) controller.abort()
    }
    await run({}, { out, signal: controller.signal, onEvent })
    const rest = await run({}, { out, resume: true })
    expect(rest.steps).toEqual(uninterrupted.steps.slice(4))
  })

  test('takes the pairs that follow if it resumes with another number of pairs per step', async () => {
    const out = join(await temporaryFolder(), 'run')
    class Watching extends BigramModel {
      readonly seen: number[] = []
      override loss(...args: Parameters<BigramModel['loss']>) {
        // Rows of a chosen and a rejected text: [10, prompt, 7 or 8, answer, 11].
        const [{ tokens, weights, rows, length }] = args
        for (let row = 0; weights && row < rows; row++)
          if (tokens[row * length + 2] === 7) this.seen.push(10 * tokens[row * length + 1] + tokens[row * length + 3])
        return super.loss(...args)
      }
    }
    const seen: number[] = []
    for (const [pairs, steps] of [
      [2, 2],
      [4, 4],
    ]) {
      const [model, reference] = [new Watching(), new BigramModel()]
      const data = preferences(sevens, { reference, pairs })
      const options = { data, steps, batchSize: 8, sequenceLength: 8, out, progress: false } as const
      await train(model, { ...options, resume: 'auto', allowChanges: true })
      seen.push(...model.seen)
      disposeModule(model)
      disposeModule(reference)
    }
    expect(seen).toHaveLength(sevens.length)
    expect(new Set(seen).size).toBe(sevens.length)
  })

  test('accepts conversations and texts, and adds their end tokens', async () => {
    const seen: string[] = []
    const template = {
      render: (messages: Conversation) =>
        messages.map(({ role, content }) => (role === 'user' ? `a${content}b` : `${content}j`)).join(''),
    }
    class Watching extends BigramModel {
      override loss(...args: Parameters<BigramModel['loss']>) {
        const [{ tokens, weights }] = args
        if (weights) {
          const text = Array.from(tokens, (token, i) => `${token}${weights[i] > 0 ? '+' : weights[i] < 0 ? '-' : ''}`)
          seen.push(text.join(' '))
        }
        return super.loss(...args)
      }
    }
    for (const pair of [
      { messages: [{ role: 'user', content: 'c' }], chosen: 'de', rejected: 'f' },
      { text: 'c', chosen: 'de', rejected: 'f' },
    ]) {
      const [model, reference] = [new Watching(), new BigramModel()]
      const data = preferences([pair], { reference, template, pairs: 1 })
      await train(model, { data, tokenizer: letters, steps: 1, batchSize: 2, sequenceLength: 5, progress: false })
      disposeModule(model)
      disposeModule(reference)
    }
    expect(seen).toEqual(['0 2 1 3+ 4+ 9+ 0 2 1 5- 9- 0', '10 2 3+ 4+ 11+ 0 10 2 5- 11- 0 0'])
  })
})

describe('preferences rejects', () => {
  const reference = { loss: () => {} } as unknown as BigramModel

  test.each([
    [{ reference: undefined }, 'reference is undefined, expected a model'],
    [{ pairs: 0 }, 'pairs is 0'],
    [{ beta: -1 }, 'beta is -1, expected a positive number'],
    [{ betas: 1 }, 'unknown option betas; did you mean beta?'],
    [{ template: {} }, 'expected an object with a method render'],
  ])('options %o', (options, expected) => {
    const make = () => preferences(sevens, { reference, ...(options as object) })
    expect(make).toThrow(expect.objectContaining({ code: 'E_CONFIG', message: expect.stringContaining(expected) }))
  })

  test.each([
    [[], 'there are no pairs'],
    [[{ tokens: [1], chosen: [2] }], 'rejected of pair 0 is undefined'],
    [[{ tokens: [1], chosen: [2], rejected: [] }], 'rejected of pair 0 is []'],
    [[{ tokens: [1], chosen: 'b', rejected: [2] }], 'chosen of pair 0 is "b"'],
    [[{ text: 'a', chosen: '', rejected: 'b' }], 'chosen of pair 0 is ""'],
    [[{ chosen: 'a', rejected: 'b' }], 'has none or several'],
    [[{ messages: [{ role: 'user', content: 'a' }], chosen: 'a', rejected: 'b' }], 'no template is given'],
  ])('pairs %o', (pairs, expected) => {
    const make = () => preferences(pairs as unknown as Preference[], { reference })
    expect(make).toThrow(expect.objectContaining({ code: 'E_DATA', message: expect.stringContaining(expected) }))
  })

  test('a pair that does not fit into a row, and the trained model as its own reference', async () => {
    await expect(run({}, { sequenceLength: 3 })).rejects.toThrow(
      'pair 0 does not fit into a row of 3; pass a sequenceLength of 4',
    )
    const model = new BigramModel()
    const data = preferences(sevens, { reference: model })
    const training = train(model, { data, steps: 1, sequenceLength: 8, progress: false })
    await expect(training).rejects.toThrow('the reference is the trained model itself')
    disposeModule(model)
  })
})
