import { type Backend, MoeError, namedParameters, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import { DeepSeek, type Session, type SessionOptions, type TurnOptions } from './index.ts'
import { limits } from './session.ts'
import { read } from './test-generation.ts'
import { tiny } from './test-tiny.ts'

const reference = referenceBackend()
const native = await createBackend()
beforeEach(() => setDefaultBackend(reference))
afterAll(() => native.dispose())

/** Turns of a conversation: the tokens added to all before, and the options of the answer. */
const turns: ReadonlyArray<readonly [added: number[], options: TurnOptions]> = [
  [[3, 7, 11, 2, 30], { maxTokens: 12 }],
  [[8], { maxTokens: 9, temperature: 0.9, seed: 4 }],
  [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], { maxTokens: 1 }],
  [[20, 21], { maxTokens: 40, temperature: 0.9, topP: 0.8, seed: 5 }],
  [[22], { maxTokens: 7 }],
  [[5], { maxTokens: 12, repetitionPenalty: 1.3 }],
  [[6, 2], { maxTokens: 12, temperature: 0.9, topK: 4, repetitionPenalty: 1.1, seed: 6 }],
  [[9], { maxTokens: 12, frequencyPenalty: 0.9, presencePenalty: 0.5, logitBias: { 4: 2 } }],
]

/** Generates the answers of a session, which must be those of generate(). Returns the lengths of prompts and the numbers of reused tokens. */
async function converse(model: DeepSeek, options: SessionOptions = {}) {
  const session = model.session(options)
  const reused: number[] = []
  const prompts: number[] = []
  const ids: number[] = []
  for (const [added, turn] of turns) {
    ids.push(...added)
    prompts.push(ids.length)
    const text = session.generate(ids, turn)
    const answer = await read(text)
    expect(answer).toEqual(await read(model.generate(ids, { ...options, ...turn })))
    reused.push(text.stats.cachedTokens)
    ids.push(...answer)
  }
  session.dispose()
  return { reused, prompts }
}

const variants: ReadonlyArray<readonly [name: string, config: object, options: SessionOptions]> = [
  ['one token at a time', { num_nextn_predict_layers: 0 }, {}],
  ['drafts of one module', { num_nextn_predict_layers: 1 }, { speculative: true }],
  ['drafts of three modules', { num_nextn_predict_layers: 3 }, { speculative: true }],
  ['modules without drafts', { num_nextn_predict_layers: 2 }, {}],
]

describe.each([
  ['the reference backend', () => reference as Backend],
  ['a backend that records', () => native as Backend],
])('a conversation on %s', (_, of) => {
  test.each(variants)(
    '%s: gives the same answers as without a session, and processes only new tokens',
    async (_name, config, options) => {
      const backend = of()
      const { handles } = backend.stats()
      const model = new DeepSeek({ ...tiny, ...config }, { seed: 3, backend })
      const { reused, prompts } = await converse(model, options)
      const depth = options.speculative ? model.mtp.length : 0
      expect(reused[0]).toBe(0)
      for (const [i, [added]] of turns.slice(1).entries()) {
        // The last generated token was not processed, and modules process tokens ahead.
        const before = prompts[i + 1] - added.length
        expect(reused[i + 1]).toBe(before - 1 - depth)
      }
      model.dispose()
      expect(backend.stats().handles).toBe(handles)
    },
  )
})

describe('a session', () => {
  const config = { ...tiny, num_nextn_predict_layers: 2 }
  const prompt = [3, 7, 11, 2, 30, 4, 9]

  /** Expects a text, and the counts of its drafts, to be those of generate(). Returns the number of reused tokens. */
  async function expectSameAsGenerate(model: DeepSeek, session: Session, ids: readonly number[]) {
    const text = session.generate(ids, { maxTokens: 10 })
    const expected = model.generate(ids, { maxTokens: 10, speculative: true })
    expect(await read(text)).toEqual(await read(expected))
    expect(text.stats.accepted).toEqual(expected.stats.accepted)
    expect(text.stats.drafted).toEqual(expected.stats.drafted)
    return text.stats.cachedTokens
  }

  test('reuses the common prefix of prompts', async () => {
    const model = new DeepSeek(config, { seed: 5 })
    const session = model.session({ speculative: true })
    expect(await expectSameAsGenerate(model, session, prompt)).toBe(0)
    // The same prompt, a shorter one, one with another end, and one without a common prefix.
    expect(await expectSameAsGenerate(model, session, prompt)).toBe(prompt.length - 2)
    expect(await expectSameAsGenerate(model, session, prompt.slice(0, 4))).toBe(2)
    expect(await expectSameAsGenerate(model, session, [...prompt.slice(0, 4), 33, 34])).toBe(2)
    expect(await expectSameAsGenerate(model, session, [39, 1])).toBe(0)
    session.dispose()
    model.dispose()
    expect(reference.stats().handles).toBe(0)
  })

  test('continues after a stop token, an abandoned text and an abort', async () => {
    const model = new DeepSeek(config, { seed: 5 })
    const session = model.session({ speculative: true })
    const whole = await read(model.generate(prompt, { maxTokens: 30, speculative: true }))
    const next = (n: number) => [...prompt, ...whole.slice(0, n), 13]
    for await (const _ of session.generate(prompt, { maxTokens: 30 })) break
    expect(await expectSameAsGenerate(model, session, next(1))).toBe(prompt.length - 2)
    await read(session.generate(prompt, { maxTokens: 30, stop: [whole[5]] }))
    expect(await expectSameAsGenerate(model, session, next(5))).toBeGreaterThanOrEqual(prompt.length + 2)
    const abort = new AbortController()
    const seen: number[] = []
    const onToken = (id: number) => seen.push(id) === 6 && abort.abort()
    const aborted = session.generate(prompt, { maxTokens: 30, signal: abort.signal, onToken })
    await expect(read(aborted)).rejects.toMatchObject({ code: 'E_ABORTED' })
    expect(await expectSameAsGenerate(model, session, next(seen.length))).toBeGreaterThanOrEqual(prompt.length + 3)
    session.dispose()
    model.dispose()
    expect(reference.stats().handles).toBe(0)
  })

  test('processes a long prompt in pieces, and all tokens again after a failure or a change of weights', async () => {
    const model = new DeepSeek(config, { seed: 5 })
    const session = model.session({ speculative: true })
    const long = Array.from({ length: 45 }, (_, i) => (i * 7) % 40)
    limits.prefillChunkSize = 10
    try {
      expect(await expectSameAsGenerate(model, session, long)).toBe(0)
      expect(await expectSameAsGenerate(model, session, [...long, ...long])).toBe(43)
    } finally {
      limits.prefillChunkSize = 2048
    }
    const onToken = () => {
      throw new Error('the listener fails')
    }
    await expect(read(session.generate(long, { onToken }))).rejects.toThrow('the listener fails')
    expect(await expectSameAsGenerate(model, session, long)).toBe(0)
    expect(await expectSameAsGenerate(model, session, long)).toBe(43)
    const { parameter } = namedParameters(model)[0]
    parameter.assign(model.infer(() => parameter.mul(-1)))
    expect(await expectSameAsGenerate(model, session, long)).toBe(0)
    session.dispose()
    model.dispose()
    expect(reference.stats().handles).toBe(0)
  })

  test('processes all tokens again if a constraint fails because it was aborted', async () => {
    const model = new DeepSeek(config, { seed: 5, backend: native })
    const session = model.session({ speculative: true })
    const allowed = () => {
      throw new MoeError({ code: 'E_ABORTED', op: 'test', problem: 'no longer needed' })
    }
    await expect(read(session.generate(prompt, { constraint: { allowed, accept() {} } }))).rejects.toThrow('no longer')
    expect(await expectSameAsGenerate(model, session, prompt)).toBe(0)
    session.dispose()
    model.dispose()
  })

  test('generates one text at a time', async () => {
    const model = new DeepSeek(config, { seed: 5 })
    const session = model.session({ speculative: true })
    const first = session.generate(prompt, { maxTokens: 4 })[Symbol.asyncIterator]()
    await first.next()
    await expect(read(session.generate(prompt))).rejects.toThrow(
      'another text of this session is being generated; read it',
    )
    // The first text is not affected.
    expect((await first.next()).done).toBe(false)
    await first.return?.()
    expect(await expectSameAsGenerate(model, session, prompt)).toBe(prompt.length - 2)
    session.dispose()
    model.dispose()
  })

  test('frees everything if disposed with an abandoned text', async () => {
    const model = new DeepSeek(config, { seed: 5 })
    for (const taken of [1, 2, 5]) {
      const session = model.session({ speculative: true })
      const text = session.generate(prompt, { maxTokens: 30 })[Symbol.asyncIterator]()
      for (let i = 0; i < taken; i++) await text.next()
      session.dispose()
    }
    model.dispose()
    expect(reference.stats().handles).toBe(0)
  })

  test('rejects options in the wrong place', () => {
    const model = new DeepSeek(tiny)
    expect(() => model.session({ maxTokens: 3 } as object)).toThrow('session: unknown option maxTokens')
    expect(() => model.session(null as never)).toThrow('session: expected an options object, got null')
    const session = model.session()
    expect(() => session.generate([1], { precision: 'bf16' } as object)).toThrow('unknown option precision')
    expect(() => session.generate([99])).toThrow('token 0 is 99, outside the vocabulary')
    model.dispose()
  })

  test.each([
    ['the reference backend', () => reference as Backend],
    ['a backend that records', () => native as Backend],
  ])('frees everything if disposed at any moment, on %s', async (_, of) => {
    const backend = of()
    const { handles } = backend.stats()
    const model = new DeepSeek(config, { seed: 5, backend })
    // Absorbed weights belong to the model.
    await read(model.generate(prompt, { maxTokens: 30, speculative: true }))
    const handlesOfModel = backend.stats().handles
    const failure = expect.objectContaining({
      code: 'E_DISPOSED',
      message: expect.stringContaining('the session was disposed'),
    })
    for (let turns = 0; turns < 14; turns++) {
      const session = model.session({ speculative: true })
      await read(session.generate(prompt, { maxTokens: 3 }))
      const text = session.generate([...prompt, 1], { maxTokens: 40 })[Symbol.asyncIterator]()
      for (let i = 0; i < 3; i++) await text.next()
      const rest = async () => {
        while (!(await text.next()).done);
      }
      // Between two tokens, or this number of turns of the event loop after the next one was requested.
      const reading = turns === 0 ? null : expect(rest()).rejects.toEqual(failure)
      for (let i = 1; i < turns; i++) await new Promise(setImmediate)
      session.dispose()
      session.dispose()
      await (reading ?? expect(rest()).rejects.toEqual(failure))
      expect(() => session.generate(prompt)).toThrow('the session was disposed; create another one')
      expect(backend.stats().handles).toBe(handlesOfModel)
    }
    model.dispose()
    expect(backend.stats().handles).toBe(handles)
  })

  test('fails if its model was disposed, and frees the rest', async () => {
    const model = new DeepSeek(config, { seed: 5 })
    const session = model.session({ speculative: true })
    await read(session.generate(prompt, { maxTokens: 3 }))
    model.dispose()
    await expect(read(session.generate(prompt))).rejects.toMatchObject({ code: 'E_DISPOSED' })
    session.dispose()
    expect(reference.stats().handles).toBe(0)
  })
})

describe.each([false, true])('at the end of the context, speculative: %s', speculative => {
  const context = 24
  const config = { ...tiny, max_position_embeddings: context, num_nextn_predict_layers: 2, eos_token_id: undefined }
  const prompt = [5, 6, 7, 8, 9, 10, 11, 12]

  const makers = ['generate', 'session', 'continuousBatch'] as const
  test.each(makers)('%s ends the text', async maker => {
    const model = new DeepSeek(config, { seed: 2, backend: referenceBackend() })
    const generator = maker === 'generate' ? undefined : model[maker]({ speculative })
    const generate = (ids: number[], options: TurnOptions) =>
      generator ? generator.generate(ids, options) : model.generate(ids, { ...options, speculative })
    const all: number[][] = []
    for (const maxTokens of [15, 16, 17, undefined]) {
      const text = generate(prompt, { maxTokens })
      const ids: number[] = []
      for await (const id of text) ids.push(id)
      expect(text.stats).toMatchObject({ finishReason: 'length', tokens: ids.length })
      all.push(ids)
    }
    expect(all.map(ids => ids.length)).toEqual([15, 16, 16, 16])
    expect(all[0]).toEqual(all[1].slice(0, 15))
    expect(all[3]).toEqual(all[1])
    const error = { code: 'E_ATTR', message: expect.stringContaining("but the model's context is 24") }
    const full = new Array<number>(context).fill(3)
    expect(() => generate(full, {})).toThrow(expect.objectContaining(error))
    expect(() => generate([...full, 3], { maxTokens: 0 })).toThrow(expect.objectContaining(error))
    const scored = generate(full, { maxTokens: 0, promptLogProbs: 0 })
    for await (const _ of scored) throw new Error('a token was generated')
    expect(scored.promptLogProbs).toHaveLength(context)
    generator?.dispose()
    model.dispose()
  })
})

test.each(['generate', 'session', 'continuousBatch'] as const)(
  '%s with maxTokens 0 only scores the prompt',
  async maker => {
    const model = new DeepSeek(tiny, { seed: 3, backend: native })
    const generator = maker === 'generate' ? model : model[maker]()
    for (const prompt of [[5], [5, 6], [5, 6, 7]]) {
      const [expected] = await model.score([prompt], { top: 2 })
      for (const promptLogProbs of [undefined, 2]) {
        const text = generator.generate(prompt, { maxTokens: 0, promptLogProbs })
        expect(await read(text)).toEqual([])
        expect(text.stats).toMatchObject({ finishReason: 'length', tokens: 0 })
        expect(text.promptLogProbs.map(scored => scored?.token)).toEqual(
          promptLogProbs === undefined ? [] : expected.map(scored => scored?.token),
        )
      }
    }
    if (generator !== model) generator.dispose()
    model.dispose()
  },
)
