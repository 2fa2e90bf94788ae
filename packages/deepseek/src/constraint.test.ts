/** @file Generation with a constraint on the next token. */
import { MoeError, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import { DeepSeek, type TokenConstraint, type TurnOptions } from './index.ts'
import { Occurrences, processLogits } from './process-logits.ts'
import { read } from './test-generation.ts'
import { makeDraftsAgree, tiny } from './test-tiny.ts'

const reference = referenceBackend()
const native = await createBackend()
beforeEach(() => setDefaultBackend(reference))
afterAll(() => native.dispose())

const END = 30

/** Whether a token may follow another. After some, all tokens are allowed. */
const follows = (token: number, last: number) => last % 5 === 0 || (token * 7 + last) % 3 !== 0

/** Allows the tokens of `follows`, as words of both array types, synchronously or not, or null if all are allowed. */
class Neighbours implements TokenConstraint {
  readonly accepted: number[] = []
  queries = 0
  #last = 1

  allowed() {
    this.queries++
    if (this.#last % 5 === 0) return null
    const words = this.queries % 2 === 0 ? new Int32Array(2) : new Uint32Array(2)
    for (let id = 0; id < 40; id++) if (follows(id, this.#last)) words[id >> 5] |= 1 << (id & 31)
    return this.queries % 3 === 0 ? Promise.resolve(words) : words
  }

  accept(token: number) {
    this.accepted.push(token)
    this.#last = token
  }
}

const samplings: TurnOptions[] = [
  {},
  { temperature: 1.2, seed: 1 },
  { temperature: 1.2, seed: 2, topK: 9, topP: 0.9, minP: 0.01 },
  { repetitionPenalty: 1.4 },
  { temperature: 0.8, repetitionPenalty: 1.4, seed: 3 },
  { temperature: 0.8, frequencyPenalty: 0.6, presencePenalty: -0.4, logitBias: { 5: 3 }, seed: 3 },
  { temperature: 1.5, seed: 4, stop: [END] },
  { temperature: 1.5, seed: 5, stop: [END], logProbs: 2 },
]

describe.each(['reference', 'native'] as const)('on the backend %s', name => {
  test.each([0, 1, 3])(
    'generate, sessions and batches produce only allowed tokens: drafts of %i modules',
    async depth => {
      const backend = { reference, native }[name]
      const { handles } = backend.stats()
      const config = { ...tiny, max_position_embeddings: 256, num_nextn_predict_layers: depth }
      const model = new DeepSeek(config, { seed: 3, backend })
      makeDraftsAgree(model)
      const speculative = depth > 0
      const session = model.session({ speculative })
      const batch = model.continuousBatch({ speculative, maxTexts: 4 })
      const turn = { maxTokens: 40 }
      // Unconstrained texts share their passes.
      const free = [{}, { temperature: 1, seed: 1 }].map(sampling =>
        read(batch.generate([7, 8], { ...sampling, ...turn })),
      )
      const batchConstraints = samplings.map(() => new Neighbours())
      const texts = samplings.map((sampling, i) =>
        batch.generate([1], { ...sampling, ...turn, constraint: batchConstraints[i] }),
      )
      const together = await Promise.all(texts.map(read))
      let refused = 0
      for (const [i, sampling] of samplings.entries()) {
        const constraints = [new Neighbours(), new Neighbours()]
        const text = model.generate([1], { ...sampling, ...turn, speculative, constraint: constraints[0] })
        const alone = await read(text)
        expect(together[i]).toEqual(alone)
        expect(await read(session.generate([1], { ...sampling, ...turn, constraint: constraints[1] }))).toEqual(alone)
        for (const [j, token] of alone.entries()) expect(follows(token, alone[j - 1] ?? 1)).toBe(true)
        for (const constraint of [batchConstraints[i], ...constraints]) {
          // It also accepts the end token, and may have accepted one draft after maxTokens.
          const ended = text.stats.finishReason === 'stop'
          expect(constraint.accepted.slice(0, alone.length + 1)).toEqual(
            ended ? [...alone, END] : [...alone, ...constraint.accepted.slice(alone.length, alone.length + 1)],
          )
          if (ended) expect(constraint.accepted).toHaveLength(alone.length + 1)
          expect(constraint.queries).toBe(constraint.accepted.length)
        }
        refused += (await read(model.generate([1], { ...sampling, ...turn }))).filter((id, j) => id !== alone[j]).length
        if (depth > 0) expect(text.stats.accepted[0]).toBeLessThan(text.stats.drafted[0])
      }
      expect(refused).toBeGreaterThan(40)
      for (const [i, sampling] of [{}, { temperature: 1, seed: 1 }].entries()) {
        expect(await free[i]).toEqual(await read(model.generate([7, 8], { ...sampling, ...turn, speculative })))
      }
      session.dispose()
      batch.dispose()
      model.dispose()
      expect(backend.stats().handles).toBe(handles)
    },
  )
})

test('the most likely allowed token is chosen, with the log-probability of the model', async () => {
  const model = new DeepSeek(tiny, { seed: 3 })
  const text = model.generate([1], { maxTokens: 20, logProbs: 40, constraint: new Neighbours() })
  const ids = await read(text)
  const [scored] = await model.score([[1, ...ids]], { top: 40 })
  for (const [i, { token, logProb, top }] of text.logProbs.entries()) {
    const { token: best } = top.find(({ token }) => follows(token, ids[i - 1] ?? 1)) as { token: number }
    expect(token).toBe(best)
    expect(Math.abs(logProb - (scored[i + 1]?.logProb as number))).toBeLessThan(1e-5)
  }
  model.dispose()
})

test('ids beyond the last word of a mask are not allowed', () => {
  const constraint: TokenConstraint = { allowed: () => null, accept() {} }
  const none = new Occurrences([], {})
  for (const [words, expected] of [
    [[-1, 1], 32],
    [[-1], 31],
    [[(1 << 31) | 5], 31],
    [[5], 2],
    [[5, 0, 8], 67],
  ] as const) {
    const logits = Float32Array.from({ length: 70 }, (_, i) => i)
    expect(processLogits(logits, none, { constraint }, Int32Array.from(words))).toBe(expected)
  }
  for (const words of [[], [0, 0, 0]]) {
    expect(() => processLogits(new Float32Array(70), none, { constraint }, Int32Array.from(words))).toThrow(
      'the constraint allows no token',
    )
  }
})

test.each([0, 2])('a constraint that throws fails only its own text: %i modules', async depth => {
  const { handles } = native.stats()
  const config = { ...tiny, max_position_embeddings: 256, num_nextn_predict_layers: depth }
  const model = new DeepSeek(config, { seed: 3, backend: native })
  const batch = model.continuousBatch({ speculative: depth > 0 })
  const expected = await read(model.generate([1, 2], { maxTokens: 50 }))
  const fails = new Error('lost')
  const after = (count: number, fail: () => never): TokenConstraint => ({
    allowed: () => (count-- > 0 ? null : fail()),
    accept() {},
  })
  const lost = () => {
    throw fails
  }
  const others = [batch.generate([1, 2], { maxTokens: 50 }), batch.generate([1, 2], { maxTokens: 50 })]
  const made = Promise.all(others.map(read))
  await Promise.all(
    [0, 1, 7].map(count =>
      expect(read(batch.generate([3, 4], { constraint: after(count, lost) }))).rejects.toBe(fails),
    ),
  )
  const nothing: TokenConstraint = { allowed: () => new Int32Array(2), accept() {} }
  await expect(read(batch.generate([3, 4], { constraint: nothing }))).rejects.toThrow(MoeError)
  await expect(read(model.generate([3, 4], { constraint: nothing, logProbs: 1 }))).rejects.toThrow(
    'the constraint allows no token',
  )
  expect(await made).toEqual([expected, expected])
  expect(() => model.generate([1], { constraint: { allowed: 1 } as never })).toThrow(
    'lacks the functions allowed and accept',
  )
  batch.dispose()
  model.dispose()
  expect(native.stats().handles).toBe(handles)
})
