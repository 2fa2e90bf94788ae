import { fileURLToPath } from 'node:url'
import { readSafetensors } from '@moe/checkpoint'
import { type Backend, fromHost, Random, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import {
  type ContinuousBatchOptions,
  DeepSeek,
  type DeepSeekConfigInput,
  type GenerateOptions,
  type Generation,
  type TokenLogProb,
  type TurnOptions,
} from './index.ts'
import { limits } from './log-probs.ts'
import { limits as scoreLimits } from './score.ts'
import { limits as sessionLimits } from './session.ts'
import { read } from './test-generation.ts'
import { makeDraftsAgree, tiny } from './test-tiny.ts'

const reference = referenceBackend()
const native = await createBackend()
beforeEach(() => setDefaultBackend(reference))
afterAll(() => native.dispose())

/** The log-softmax in float64. */
function logSoftmax(logits: ArrayLike<number>): number[] {
  const largest = Math.max(...Array.from(logits))
  const sum = Array.from(logits).reduce((sum, x) => sum + Math.exp(x - largest), 0)
  return Array.from(logits, x => x - largest - Math.log(sum))
}

/** For each position of a text, the log-probabilities `[V]` of the next token. */
async function expectedOf(model: DeepSeek, ids: readonly number[]): Promise<number[][]> {
  const logits = model.infer(() => model.forward(fromHost(Int32Array.from(ids), [1, ids.length], 'i32', model.backend)))
  const values = await logits.values()
  logits.dispose()
  const { vocab_size: vocabulary } = model.config
  return ids.map((_, t) => logSoftmax(values.subarray(t * vocabulary, (t + 1) * vocabulary)))
}

const tolerance = { relative: 1e-4, absolute: 1e-5 }

/** Expects log-probabilities of the tokens `ids[from...]` to be those of a forward pass of the model. */
async function expectLogProbs(
  model: DeepSeek,
  ids: readonly number[],
  from: number,
  logProbs: ReadonlyArray<TokenLogProb | null>,
  top: number,
): Promise<void> {
  const expected = await expectedOf(model, ids)
  expect(logProbs).toHaveLength(ids.length - from)
  for (const [i, one] of logProbs.entries()) {
    if (from + i === 0) {
      expect(one).toBeNull()
      continue
    }
    const row = expected[from + i - 1]
    const { token, logProb, top: likeliest } = one as TokenLogProb
    expect(token).toBe(ids[from + i])
    assertClose(`token ${from + i}`, [logProb], [row[token]], tolerance)
    const order = row.toSorted((a, b) => b - a).slice(0, top)
    assertClose(
      `likeliest ${from + i}`,
      likeliest.map(({ logProb }) => logProb),
      order,
      tolerance,
    )
    assertClose(
      `tokens of the likeliest ${from + i}`,
      likeliest.map(({ token }) => row[token]),
      order,
      tolerance,
    )
    expect(new Set(likeliest.map(({ token }) => token)).size).toBe(Math.min(top, row.length))
    for (const same of likeliest.filter(other => other.token === token)) expect(same.logProb).toBe(logProb)
  }
}

const llama: DeepSeekConfigInput = {
  model_type: 'llama',
  vocab_size: 40,
  hidden_size: 24,
  intermediate_size: 32,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  initializer_range: 0.3,
  eos_token_id: null,
  bos_token_id: null,
}

const prompt = Array.from({ length: 90 }, (_, i) => (i * 7 + (i >> 3)) % 40)
const requests: ReadonlyArray<readonly [ids: number[], options: TurnOptions]> = [
  [prompt.slice(0, 5), { logProbs: 3 }],
  [prompt, { logProbs: 0, promptLogProbs: 2, temperature: 1.2, seed: 3 }],
  [[8], { logProbs: 50, promptLogProbs: 0, repetitionPenalty: 1.3 }],
  [prompt.slice(0, 8), { promptLogProbs: 1, temperature: 0.7, topK: 4, repetitionPenalty: 1.1 }],
  [prompt.slice(0, 70), { promptLogProbs: 4, maxTokens: 0 }],
  [prompt.slice(0, 8), { promptLogProbs: 4, maxTokens: 0 }],
  [[8], { promptLogProbs: 4, maxTokens: 0 }],
  [prompt.slice(0, 66), { maxTokens: 20 }],
  [prompt.slice(0, 66), { logProbs: 1, promptLogProbs: 1, maxTokens: 40 }],
]

async function expectLogProbsOf(model: DeepSeek, text: Generation<number>, ids: number[], options: GenerateOptions) {
  const { logProbs, promptLogProbs, ...plain } = options
  const generated = await read(text)
  // Returning log-probabilities does not change the text.
  expect(generated).toEqual(await read(model.generate(ids, plain)))
  if (logProbs === undefined) expect(text.logProbs).toEqual([])
  else await expectLogProbs(model, [...ids, ...generated], ids.length, text.logProbs, logProbs)
  const isGreedy = !options.temperature && !options.repetitionPenalty
  if (isGreedy && logProbs) expect(text.logProbs.map(({ top }) => top[0].token)).toEqual(generated)
  if (promptLogProbs === undefined) expect(text.promptLogProbs).toEqual([])
  else {
    await expectLogProbs(model, ids, 0, text.promptLogProbs, promptLogProbs)
    expect(text.stats.cachedTokens).toBe(0)
  }
  expect(text.stats.finishReason).toBe('length')
  expect(text.stats.drafted).toHaveLength(options.speculative ? model.mtp.length : 0)
}

describe.each([
  ['the reference backend', () => reference as Backend],
  ['a backend that records', () => native as Backend],
])('on %s', (_, of) => {
  const make = (mtp = 0) => {
    const config = { ...tiny, num_nextn_predict_layers: mtp, max_position_embeddings: 256 }
    return new DeepSeek(config, { seed: 3, backend: of() })
  }

  test.each([
    ['one token at a time', 0, 2048],
    ['with drafts, prompts in pieces', 2, 7],
  ])('a session returns log-probabilities: %s', async (_name, mtp, piece) => {
    const { handles } = of().stats()
    const model = make(mtp)
    const speculative = mtp > 0
    const session = model.session({ speculative })
    sessionLimits.prefillChunkSize = piece
    limits.logits = 40 * 3
    try {
      for (const [ids, options] of requests) {
        const turn = { maxTokens: 12, ...options }
        await expectLogProbsOf(model, session.generate(ids, turn), ids, { ...turn, speculative })
      }
    } finally {
      sessionLimits.prefillChunkSize = 2048
      limits.logits = 2 ** 24
    }
    session.dispose()
    model.dispose()
    expect(of().stats().handles).toBe(handles)
  })

  test.each<[string, ContinuousBatchOptions]>([
    ['all at once', { maxTexts: 16 }],
    ['in small pieces', { maxTexts: 3, prefillChunkSize: 7 }],
    ['with preempted texts', { maxTexts: 8, prefillChunkSize: 40, cacheTokens: 256 }],
    ['with drafts', { maxTexts: 4, prefillChunkSize: 40, cacheTokens: 320, speculative: true }],
  ])('a batch returns log-probabilities: %s', async (_name, options) => {
    const { handles } = of().stats()
    const { speculative = false } = options
    const model = make(speculative ? 2 : 0)
    makeDraftsAgree(model)
    const batch = model.continuousBatch(options)
    const turns = requests.map(([ids, turn]) => [ids, { maxTokens: 12, ...turn }] as const)
    const texts = turns.map(([ids, turn]) => batch.generate(ids, turn))
    await Promise.all(
      texts.map((text, i) => expectLogProbsOf(model, text, turns[i][0], { ...turns[i][1], speculative })),
    )
    batch.dispose()
    model.dispose()
    expect(of().stats().handles).toBe(handles)
  })

  test('the token that ends a text has a log-probability, too', async () => {
    const { handles } = of().stats()
    const model = make(2)
    const batch = model.continuousBatch()
    const session = model.session()
    const [all, ids] = [await read(model.generate([8], { maxTokens: 9 })), [8]]
    for (const length of all.keys()) {
      if (all.indexOf(all[length]) < length) continue
      for (const by of [batch, session]) {
        const text = by.generate(ids, { logProbs: 2, stop: [all[length]], maxTokens: 9 })
        expect(await read(text)).toEqual(all.slice(0, length))
        expect(text.stats).toMatchObject({ finishReason: 'stop', tokens: length })
        await expectLogProbs(model, [...ids, ...all.slice(0, length + 1)], 1, text.logProbs, 2)
        expect(text.logProbs).toHaveLength(length + 1)
      }
    }
    session.dispose()
    batch.dispose()
    model.dispose()
    expect(of().stats().handles).toBe(handles)
  })

  test('prompt log-probabilities continue after preemption', async () => {
    const model = make()
    // The cache has five pages of 64. Both other texts take a second page while this prompt is at its second.
    const batch = model.continuousBatch({ cacheTokens: 320, prefillChunkSize: 31 })
    const others = [1, 2].map(id => read(batch.generate([id, ...prompt.slice(0, 60)], { maxTokens: 12 })))
    const ids = [...prompt, ...prompt.slice(0, 10)]
    const text = batch.generate(ids, { promptLogProbs: 1, maxTokens: 1 })
    await read(text)
    await Promise.all(others)
    await expectLogProbs(model, ids, 0, text.promptLogProbs, 1)
    expect(text.stats.cachedTokens).toBe(64)
    batch.dispose()
    model.dispose()
  })

  test('score returns log-probabilities, however texts are batched into passes', async () => {
    const { handles } = of().stats()
    const model = make(1)
    const texts = [prompt.slice(0, 9), [3], prompt, Int32Array.of(4, 5), prompt.slice(2, 11)]
    for (const [passTokens, logits] of [
      [4096, 2 ** 24],
      [1, 1],
      [30, 40 * 4],
    ]) {
      Object.assign(scoreLimits, { passTokens })
      Object.assign(limits, { logits })
      const scores = await model.score(texts, { top: 2 })
      for (const [i, text] of texts.entries()) await expectLogProbs(model, Array.from(text), 0, scores[i], 2)
    }
    scoreLimits.passTokens = 4096
    limits.logits = 2 ** 24
    expect(await model.score([])).toEqual([])
    expect((await model.score([[1, 2]]))[0][1]?.top).toEqual([])
    model.dispose()
    expect(of().stats().handles).toBe(handles)
  })
})

/** Texts with common prefixes: the same examples, one of three questions, and answers of several lengths, some of them prefixes of others. */
const examples = Array.from({ length: 40 }, (_, i) => (i * 11) % 40)
const questions = [0, 1, 2].map(q => [...examples, ...prompt.slice(20 * q, 20 * q + 14 + 9 * q)])
const answers = [[3], [3, 4], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [7, 1, 2], [9]]
const scoredTexts = questions.flatMap(question => answers.map(answer => ({ question, text: [...question, ...answer] })))

describe.each<[string, DeepSeekConfigInput]>([
  ['latent attention', { ...tiny, max_position_embeddings: 256 }],
  ['keys and values', { ...llama, max_position_embeddings: 256 }],
])('texts with common prefixes, %s', (_, config) => {
  /** Counts the tokens of all passes during `run`. */
  async function counted<T>(model: DeepSeek, run: () => Promise<T>): Promise<{ result: T; read: number }> {
    const hidden = model.hidden.bind(model)
    let read = 0
    model.hidden = (ids, options) => {
      read += ids.size
      return hidden(ids, options)
    }
    const result = await run()
    model.hidden = hidden
    return { result, read }
  }

  test.each([4096, 64, 1])('are scored as if alone: passes of %i tokens', async passTokens => {
    const { handles } = reference.stats()
    const model = new DeepSeek(config, { seed: 3 })
    const texts = [...scoredTexts.map(({ text }) => text), [5], prompt, [...prompt.slice(0, 30), 1, 1], [6, 7], [6, 7]]
    const from = [...scoredTexts.map(({ question }) => question.length), 0, 50, 30, 1, 2]
    const before = { ...scoreLimits }
    Object.assign(scoreLimits, { passTokens })
    const done: number[] = []
    const scores = await model.score(texts, { top: 2, from, onProgress: share => done.push(share) })
    Object.assign(scoreLimits, before)
    for (const [i, text] of texts.entries()) {
      const first = Math.max(1, from[i])
      expect(scores[i].slice(0, first)).toEqual(new Array(Math.min(first, text.length)).fill(null))
      await expectLogProbs(model, text, first, scores[i].slice(first), 2)
    }
    expect(done.at(-1)).toBe(1)
    expect(done).toEqual(done.toSorted((a, b) => a - b))
    model.dispose()
    expect(reference.stats().handles).toBe(handles)
  })

  test('process their common prefix once', async () => {
    const model = new DeepSeek(config, { seed: 3 })
    const texts = scoredTexts.map(({ text }) => text)
    const from = scoredTexts.map(({ question }) => question.length)
    const alone = await counted(model, () => Promise.all(texts.map(text => model.score([text]))))
    const together = await counted(model, () => model.score(texts, { from }))
    // Together, the 40 tokens of examples, the questions and the answers are processed once, except some common prefixes of answers.
    expect(alone.read).toBeGreaterThan(900)
    expect(together.read).toBeLessThan(200)
    // One token of each text is scored, so that only the question is processed.
    const letters = [1, 2, 3, 4].map(letter => [...questions[0], letter])
    const last = await counted(model, () => model.score(letters, { from: letters.map(() => questions[0].length) }))
    expect(last.read).toBe(questions[0].length)
    expect(new Set(last.result.map(scores => scores.at(-1)?.logProb)).size).toBe(4)
    // If all tokens are scored, each is processed once.
    const whole = await counted(model, () => model.score(texts.slice(0, 2)))
    expect(whole.read).toBe(texts[1].length - 1)
    const [, , long, other] = texts
    const both = await counted(model, () => model.score([long, other]))
    expect(both.read).toBe(2 * (long.length - 1))
    model.dispose()
  })

  test('of any length are scored correctly, from any position', async () => {
    const model = new DeepSeek(config, { seed: 3 })
    const random = new Random(5)
    const texts = Array.from({ length: 24 }, () => [
      ...examples.slice(0, random.integer(4) * 10),
      ...Array.from({ length: 1 + random.integer(12) }, () => random.integer(2)),
    ])
    const from = texts.map(({ length }) => random.integer(length + 1))
    const scores = await model.score(texts, { from })
    for (const [i, text] of texts.entries()) {
      const first = Math.max(1, from[i])
      if (first < text.length) await expectLogProbs(model, text, first, scores[i].slice(first), 0)
    }
    model.dispose()
  })
})

test('scoring can be aborted between two passes', async () => {
  const { handles } = reference.stats()
  const model = new DeepSeek({ ...tiny, max_position_embeddings: 256 }, { seed: 3 })
  const before = { ...scoreLimits }
  Object.assign(scoreLimits, { passTokens: 64 })
  const controller = new AbortController()
  const reason = new Error('enough')
  const texts = scoredTexts.map(({ text }) => text)
  const from = scoredTexts.map(({ question }) => question.length)
  let passes = 0
  const onProgress = () => {
    passes++
    controller.abort(reason)
  }
  const scoring = model.score(texts, { from, signal: controller.signal, onProgress })
  await expect(scoring).rejects.toMatchObject({ code: 'E_ABORTED', cause: reason })
  expect(passes).toBe(1)
  Object.assign(scoreLimits, before)
  model.dispose()
  expect(reference.stats().handles).toBe(handles)
})

test('a text may have one token more than the context', async () => {
  const model = new DeepSeek({ ...tiny, max_position_embeddings: 64 }, { seed: 3 })
  const [scores] = await model.score([prompt.slice(0, 65)])
  await expectLogProbs(model, prompt.slice(0, 65), 0, scores, 0)
  await expect(model.score([[1], prompt.slice(0, 66)])).rejects.toThrow(
    "text 1 has 66 tokens, more than the model's context of 64 plus one; split it",
  )
  model.dispose()
})

test.each(['v3-base', 'v2-lite', 'llama-gqa'])('score equals the log-probabilities of transformers: %s', async name => {
  const folder = fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url))
  const file = await readSafetensors(`${folder}/expected.safetensors`)
  const ids = await file.read('input_ids')
  const logits = (await file.read('logits')).data as Float32Array
  await file.close()
  const model = await DeepSeek.fromPretrained(folder)
  const [rows, time] = ids.shape
  const { vocab_size: vocabulary } = model.config
  const texts = Array.from({ length: rows }, (_, b) =>
    Array.from((ids.data as Int32Array).subarray(b * time, (b + 1) * time)),
  )
  const scores = await model.score(texts)
  for (const [b, text] of texts.entries()) {
    const own = scores[b].slice(1).map(one => (one as TokenLogProb).logProb)
    const expected = text.slice(1).map((token, t) => {
      const at = (b * time + t) * vocabulary
      return logSoftmax(logits.subarray(at, at + vocabulary))[token]
    })
    assertClose(`text ${b}`, own, expected, { relative: 1e-4, absolute: 1e-4 })
  }
  model.dispose()
})

test('invalid arguments are rejected', async () => {
  const { handles } = reference.stats()
  const model = new DeepSeek(tiny, { seed: 3 })
  expect(() => model.generate([1], { logProbs: -1 })).toThrow('expected a number of tokens for logProbs, got -1')
  expect(() => model.generate([1], { promptLogProbs: true as never })).toThrow(
    'expected a number of tokens for promptLogProbs, got true',
  )
  await expect(model.score([[1], []])).rejects.toThrow('score: the text is empty')
  await expect(model.score([1, 2] as never)).rejects.toThrow('expected the token ids of the text, got 1')
  await expect(model.score('text' as never)).rejects.toThrow('expected a list of texts')
  await expect(model.score([[40]])).rejects.toThrow('token 0 is 40, outside the vocabulary of 40')
  await expect(model.score([[1]], { top: 0.5 })).rejects.toThrow('expected a number of tokens for top, got 0.5')
  await expect(model.score([[1]], { from: [1, 2] })).rejects.toThrow('from = [1,2], expected one position for each')
  await expect(model.score([[1]], { from: [-1] })).rejects.toThrow('from = [-1], expected one position')
  await expect(model.score([[1]], { from: 1 as never })).rejects.toThrow('from = 1, expected one position')
  await expect(model.score([[1]], { topp: 1 } as never)).rejects.toThrow('did you mean top?')
  model.dispose()
  expect(reference.stats().handles).toBe(handles)
})

test('frees everything if the log-probabilities of a pass fail', async () => {
  const model = new DeepSeek(tiny, { seed: 3 })
  // Absorbed weights and rotation tables belong to the model.
  await read(model.generate([1, 2], { promptLogProbs: 0, maxTokens: 0 }))
  await model.score([[1, 2]])
  const { lm_head: head } = model
  const before = reference.stats().handles
  const forward = head.forward.bind(head)
  head.forward = () => {
    throw new Error('no memory')
  }
  await expect(read(model.generate([1, 2], { promptLogProbs: 0, maxTokens: 0 }))).rejects.toThrow('no memory')
  await expect(model.score([[1, 2]])).rejects.toThrow('no memory')
  head.forward = forward
  expect(reference.stats().handles).toBe(before)
  model.dispose()
})
