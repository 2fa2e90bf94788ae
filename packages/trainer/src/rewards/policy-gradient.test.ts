import { readFile } from 'node:fs/promises'
import { backward, disposeModule, scope, setDefaultBackend, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import fc from 'fast-check'
import { afterEach, beforeAll, describe, expect, test } from 'vitest'
import { TalkingBigram, testVocabulary } from '../test-model.ts'
import { countOf, PackedTexts } from './packed-texts.ts'
import { advantagesOf, divergence, meanTerms, tokenTerm, tokenWeights } from './policy-gradient.ts'

const backend = referenceBackend()
beforeAll(() => setDefaultBackend(backend))
afterEach(() => expect(backend.stats().handles).toBe(0))

interface FixtureText {
  readonly prompt: number[]
  readonly tokens: number[]
  readonly reward: number
  readonly old: number[]
  readonly reference: number[]
}

interface Fixture {
  readonly embed: number[][]
  readonly head: number[][]
  readonly texts: FixtureText[]
  readonly groupSize: number
  readonly cases: Array<{
    readonly average: 'token' | 'text'
    readonly clip: [number, number]
    readonly klWeight: number
    readonly advantages: number[]
    readonly objective: number
    readonly embed: number[][]
    readonly head: number[][]
  }>
}

const fixture: Fixture = JSON.parse(await readFile(new URL('../../fixtures/grpo.json', import.meta.url), 'utf8'))
const { texts, groupSize } = fixture
const advantages = Array.from({ length: texts.length / groupSize }, (_, g) =>
  advantagesOf(texts.slice(g * groupSize, (g + 1) * groupSize).map(({ reward }) => reward)),
).flat()

function fixtureModel(): TalkingBigram {
  const model = new TalkingBigram()
  scope(() => {
    model.embed_tokens.weight.assign(tensor(fixture.embed.flat(), [testVocabulary, 6]))
    model.lm_head.weight.assign(tensor(fixture.head.flat(), [testVocabulary, 6]))
  })
  return model
}

const placements = [
  { name: 'rows of one text each', isolate: false, batchSize: 2, sequenceLength: 10, lookahead: 1 },
  { name: 'rows with several packed texts', isolate: true, batchSize: 2, sequenceLength: 17, lookahead: 1 },
  { name: 'more and longer rows than needed', isolate: true, batchSize: 5, sequenceLength: 12, lookahead: 3 },
]

describe.each(placements)('with $name', placement => {
  const packed = () =>
    new PackedTexts(
      texts.map(({ prompt: ids, tokens }) => ({ ids, tokens })),
      placement,
    )

  test('logProbs returns the log-probabilities of the model for the tokens of each text', async () => {
    const model = fixtureModel()
    const table = await model.table()
    const read = await packed().logProbs(model, 'f32')
    for (const [i, { prompt, tokens }] of texts.entries()) {
      const all = [...prompt, ...tokens]
      const expected = tokens.map((token, t) => Math.log(table[all[prompt.length + t - 1]][token]))
      assertClose(`text ${i}`, read[i], expected, { relative: 1e-6, absolute: 1e-6 })
    }
    disposeModule(model)
  })

  test.each(fixture.cases)(
    'objective and gradients equal those of PyTorch: average $average, clip $clip, klWeight $klWeight',
    async expected => {
      const model = fixtureModel()
      const rows = packed()
      const now = await rows.logProbs(model, 'f32')
      assertClose('advantages', advantages, expected.advantages, { relative: 1e-12, absolute: 1e-12 })
      const odds = texts.map(({ old, reference }, i) => ({ advantage: advantages[i], now: now[i], old, reference }))
      const { weights, terms } = tokenWeights(odds, expected)
      expect(meanTerms(terms, countOf(texts.map(({ tokens }) => tokens))).objective).toBeCloseTo(expected.objective, 6)
      const batches = rows.weighted(weights)
      const total = texts.reduce((sum, { tokens }) => sum + tokens.length, 0)
      let counted = 0
      for (const batch of batches) {
        scope(() => {
          const { loss, count } = model.loss(batch)
          // Micro-batches are weighted by their number of positions, as in a training step.
          backward(loss.mul(count / total))
          counted += count
        })
      }
      expect(counted).toBe(total)
      for (const name of ['embed', 'head'] as const) {
        const { grad } = (name === 'embed' ? model.embed_tokens : model.lm_head).weight
        const values = await grad?.values()
        assertClose(name, values ?? [], expected[name].flat(), { relative: 2e-6, absolute: 1e-7 })
      }
      for (const parameter of [model.embed_tokens.weight, model.lm_head.weight]) parameter.zeroGrad()
      disposeModule(model)
    },
  )
})

test.each(fixture.cases)('texts on another rank, or left out, count in the averages: average $average', how => {
  const odds = texts.map(({ old, reference }, i) => ({ advantage: advantages[i], now: reference, old, reference }))
  const tokens = countOf(texts.map(({ tokens }) => tokens))
  const learned = tokens - 5
  const own = tokenWeights(odds.slice(2), how, { texts: texts.length, tokens, learned })
  const whole = tokenWeights(odds, how)
  // The loss is a mean over the learned tokens.
  for (const [i, weights] of whole.weights.slice(2).entries())
    assertClose(
      'weights',
      own.weights[i].map(weight => weight / learned),
      weights.map(weight => weight / tokens),
      { relative: 1e-12, absolute: 0 },
    )
})

const logProb = fc.double({ min: -8, max: 0, noNaN: true })
const advantage = fc.double({ min: -3, max: 3, noNaN: true })

test('the slope of a token term is the derivative of its value', () => {
  const h = 1e-6
  fc.assert(
    fc.property(advantage, logProb, logProb, fc.option(logProb, { nil: undefined }), (a, now, old, reference) => {
      const limits = { clip: [0.2, 0.3], klWeight: 0.1 } as const
      const ratio = Math.exp(now - old)
      // Clipping makes a kink without a derivative.
      fc.pre(Math.abs(ratio - 0.8) > 1e-3 && Math.abs(ratio - 1.3) > 1e-3 && ratio < 50)
      fc.pre(reference === undefined || reference - now < 4)
      const at = (now: number) => tokenTerm(a, { now, old, reference }, limits).value
      const slope = (at(now + h) - at(now - h)) / (2 * h)
      expect(tokenTerm(a, { now, old, reference }, limits).slope).toBeCloseTo(slope, 4)
    }),
  )
})

test('without earlier updates and a reference, the weight of each token is the advantage of its text', () => {
  fc.assert(
    fc.property(fc.array(fc.tuple(advantage, fc.array(logProb, { minLength: 1 })), { minLength: 1 }), input => {
      const odds = input.map(([advantage, now]) => ({ advantage, now, old: now }))
      const { weights, terms } = tokenWeights(odds, { clip: 0.2, klWeight: 0, average: 'token' })
      expect(weights.map(list => Array.from(list, x => x + 0))).toEqual(
        input.map(([advantage, now]) => now.map(() => advantage + 0)),
      )
      expect(terms.every(({ clipped }) => clipped === 0)).toBe(true)
    }),
  )
})

test("with average: 'text', texts of all lengths have the same weight", () => {
  const text = (length: number) => ({ advantage: 1, now: Array(length).fill(-1), old: Array(length).fill(-1) })
  const { weights } = tokenWeights([text(1), text(4)], { clip: 0.2, klWeight: 0, average: 'text' })
  expect(weights.map(list => [...list])).toEqual([[2.5], [0.625, 0.625, 0.625, 0.625]])
})

describe('advantages', () => {
  test('have mean 0 and standard deviation 1, and do not depend on shift and scale of the rewards', () => {
    const rewards = fc.array(fc.integer({ min: -50, max: 50 }), { minLength: 2, maxLength: 12 })
    fc.assert(
      fc.property(rewards, fc.integer({ min: -9, max: 9 }), fc.constantFrom(0.1, 1, 7), (input, shift, factor) => {
        const own = advantagesOf(input)
        const square = own.reduce((sum, x) => sum + x * x, 0) / own.length
        expect(own.reduce((sum, x) => sum + x, 0)).toBeCloseTo(0, 9)
        expect(square).toBeCloseTo(new Set(input).size === 1 ? 0 : 1, 9)
        const changed = advantagesOf(input.map(x => factor * (x + shift)))
        for (const [i, x] of changed.entries()) expect(x).toBeCloseTo(own[i], 6)
      }),
    )
  })

  test('are 0 for rewards that are equal up to rounding', () => {
    expect(advantagesOf([0.1 + 0.2, 0.3, 0.3])).toEqual([0, 0, 0])
    expect(advantagesOf([0, 0])).toEqual([0, 0])
    expect(advantagesOf([1e-12, 0])).toEqual([1, -1])
  })
})

test('the divergence is 0 for equal log-probabilities, and non-negative otherwise', () => {
  fc.assert(fc.property(fc.double({ min: -5, max: 5, noNaN: true }), x => divergence(x) >= 0))
  expect(divergence(0)).toBe(0)
  expect(divergence(1e-6)).toBeCloseTo(5e-13, 16)
})
