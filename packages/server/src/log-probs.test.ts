import { setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { DeepSeek, type TokenLogProb } from '@moe/deepseek'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import OpenAI from 'openai'
import type { ChatCompletionChunk, Completion } from 'openai/resources'
import { describe, expect, onTestFinished, test } from 'vitest'
import { createServer, serve } from './index.ts'
import { completionLogProbs } from './log-probs.ts'
import { bytewise, config, events, modelServer, post, scriptedServer, tokenizer } from './test-server.ts'

/** A token in the notation of OpenAI. */
const text = (id: number) => {
  const decoded = tokenizer.decode([id])
  if (!decoded.includes('\ufffd')) return decoded
  const hex = Buffer.from(tokenizer.tokenBytes(id)).toString('hex')
  return `bytes:${hex.replace(/../g, pair => (/^[2-7]/.test(pair) && pair !== '7f' ? String.fromCharCode(Number.parseInt(pair, 16)) : `\\x${pair}`))}`
}

function expectClose(actual: ReadonlyArray<number | null>, expected: ReadonlyArray<number | null>, about = '') {
  expect(actual.length, about).toBe(expected.length)
  for (const [i, value] of actual.entries()) {
    if (expected[i] === null) expect(value, `${about} ${i}`).toBeNull()
    else expect(Math.abs((value as number) - expected[i]), `${about} ${i}`).toBeLessThan(1e-5)
  }
}

/** Expects the log-probabilities of a completion to be those of the model for these tokens. */
function expectLogProbs(
  actual: Completion['choices'][number]['logprobs'],
  score: ReadonlyArray<TokenLogProb | null>,
  ids: readonly number[],
  alternatives: number,
) {
  expect(actual?.tokens).toEqual(ids.map(text))
  expectClose(
    actual?.token_logprobs as never,
    score.map(one => one?.logProb ?? null),
  )
  for (const [i, one] of score.entries()) {
    const found = actual?.top_logprobs?.[i]
    if (one === null) {
      expect(found).toBeNull()
      continue
    }
    const all = new Map([...one.top.slice(0, alternatives), one].map(({ token, logProb }) => [text(token), logProb]))
    expect(Object.keys(found ?? {}).sort()).toEqual([...all.keys()].sort())
    for (const [name, logProb] of all) expectClose([found?.[name] as number], [logProb])
  }
}

async function openaiOf(app: Parameters<typeof serve>[0]) {
  const server = await serve(app, { port: 0 })
  onTestFinished(() => server.close({ timeout: 0 }))
  return new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'any', maxRetries: 0 })
}

async function generatedBy(model: DeepSeek, ids: ArrayLike<number>, options: object): Promise<number[]> {
  const generated: number[] = []
  for await (const id of model.generate(ids, { ...options, speculative: false })) generated.push(id)
  return generated
}

describe('completions', () => {
  test.each([
    { logprobs: 3, echo: true },
    { logprobs: 0, echo: true },
    { logprobs: 5 },
    { logprobs: 1, echo: true, max_tokens: 0 },
  ])('return the log-probabilities of the model, streamed or not: %j', async request => {
    const { app, model, dispose } = modelServer()
    const openai = await openaiOf(app)
    const sampling = { temperature: 0.8, seed: 9 }
    const { echo = false, logprobs, max_tokens: maxTokens = 9 } = request
    const prompts = ['the people', 'für']
    const ask = { model: 'tiny', prompt: prompts, ...sampling, max_tokens: maxTokens, ...request }
    const whole = await openai.completions.create(ask)
    expect(whole.choices).toHaveLength(2)
    for (const { index, text: completion, logprobs: returned } of whole.choices) {
      const prompt = [...tokenizer.encode(prompts[index])]
      const generated = await generatedBy(model, prompt, { ...sampling, maxTokens })
      const generatedText = tokenizer.decode(generated, { skipSpecialTokens: true })
      expect(completion).toBe((echo ? prompts[index] : '') + generatedText)
      const [score] = await model.score([[...prompt, ...generated]], { top: 5 })
      const from = echo ? 0 : prompt.length
      expectLogProbs(returned, score.slice(from), [...prompt, ...generated].slice(from), logprobs)
      // The offset of a token is the number of complete characters before it, including the prompt.
      const before = (ids: number[]) => tokenizer.createDecodeStream({ skipSpecialTokens: true }).push(ids)
      const lengths = [...prompt, ...generated].map((_, i, ids) => [...before(ids.slice(0, i))].length)
      expect(returned?.text_offset).toEqual(lengths.slice(from))
      const all = [...prompts[index], ...generatedText]
      for (const [i, name] of returned?.tokens?.entries() ?? [])
        if (!/^(bytes:|<\|)/.test(name)) expect(all.slice(lengths[from + i]).join('')).toContain(name)
    }
    const streamed = whole.choices.map(() => ({
      text: '',
      tokens: [] as string[],
      token_logprobs: [] as (number | null)[],
      top_logprobs: [] as unknown[],
      text_offset: [] as number[],
    }))
    for await (const { choices } of await openai.completions.create({ ...ask, stream: true })) {
      for (const { index, text, logprobs } of choices) {
        const own = streamed[index]
        own.text += text
        own.tokens.push(...(logprobs?.tokens ?? []))
        own.token_logprobs.push(...(logprobs?.token_logprobs ?? []))
        own.top_logprobs.push(...(logprobs?.top_logprobs ?? []))
        own.text_offset.push(...(logprobs?.text_offset ?? []))
      }
    }
    for (const [i, { text, token_logprobs: logProbs, top_logprobs: tops, ...same }] of streamed.entries()) {
      expect(text).toBe(whole.choices[i].text)
      expect(whole.choices[i].logprobs).toMatchObject(same)
      expectClose(logProbs, whole.choices[i].logprobs?.token_logprobs as never)
      expect(tops).toHaveLength(same.tokens.length)
    }
    expect(dispose()).toBe(0)
  })

  test('echo the prompt, given as text or token ids', async () => {
    const { app, dispose } = modelServer()
    const ask = async (prompt: unknown, more: object = {}) => {
      const response = await app.request('/v1/completions', post({ prompt, echo: true, max_tokens: 0, ...more }))
      const { choices, usage } = (await response.json()) as Completion
      expect(usage?.completion_tokens).toBe(0)
      expect(choices.every(({ finish_reason: end }) => end === 'length')).toBe(true)
      return choices.map(({ text }) => text)
    }
    const special = 'a<|user|>🙂'
    expect(await ask(special)).toEqual([special])
    expect(await ask([...tokenizer.encode(special)])).toEqual([special])
    expect(await ask([special, 'für'], { n: 2 })).toEqual([special, special, 'für', 'für'])
    expect(await ask([[...tokenizer.encode('the')], [...tokenizer.encode('alle')]])).toEqual(['the', 'alle'])
    expect(await ask(bytewise('a🙂').slice(0, 3))).toEqual(['a\ufffd'])
    // The begin token that the server adds to an empty prompt is not echoed.
    expect(await ask('')).toEqual([''])
    // Nothing is generated, so that the prompt may fill the context.
    const full = new Array(64).fill(tokenizer.encode('a')[0])
    expect(await ask(full, { logprobs: 1 })).toEqual(['a'.repeat(64)])
    const response = await app.request('/v1/completions', post({ prompt: [...full, 1], echo: true, max_tokens: 0 }))
    expect(response.status).toBe(400)
    expect(dispose()).toBe(0)
  })

  test('include tokens that the tokenizer adds, which are not part of the text', async () => {
    const begin = config.bos_token_id as number
    const adding = Object.create(tokenizer, {
      encode: { value: (text: string) => Uint32Array.of(begin, ...tokenizer.encode(text)) },
      createDecodeStream: { value: (options?: object) => tokenizer.createDecodeStream(options) },
      tokenBytes: { value: (id: number) => tokenizer.tokenBytes(id) },
      idToToken: { value: (id: number) => tokenizer.idToToken(id) },
    })
    const { app, dispose } = modelServer({ tokenizer: adding })
    const ask = { prompt: '🙂a', echo: true, max_tokens: 0, logprobs: 0 }
    const { choices } = (await (await app.request('/v1/completions', post(ask))).json()) as Completion
    const ids = [begin, ...tokenizer.encode('🙂a')]
    expect(choices[0].text).toBe('🙂a')
    expect(choices[0].logprobs?.tokens).toHaveLength(ids.length)
    expect(choices[0].logprobs?.tokens?.[0]).toBe('<|begin|>')
    expect(choices[0].logprobs?.text_offset?.slice(0, 2)).toEqual([0, 0])
    expect(choices[0].logprobs?.text_offset?.at(-1)).toBe(1)
    dispose()
  })
})

/** A server that generates these tokens, then the token `end` or none. All log-probabilities are -1; the best alternative is `likeliest`. */
function serverThatGenerates(
  ids: readonly number[],
  { end, likeliest = 77 }: { end?: number; likeliest?: number } = {},
) {
  const logProbOf = (token: number) => ({ token, logProb: -1, top: [{ token: likeliest, logProb: -0.5 }] })
  return scriptedServer(async function* (_, stats, logProbs) {
    const stream = tokenizer.createDecodeStream({ skipSpecialTokens: true })
    for (const id of ids) {
      stats.tokens++
      logProbs.push(logProbOf(id))
      const text = stream.push(id)
      if (text !== '') yield text
    }
    const rest = stream.end()
    if (rest !== '') yield rest
    if (end !== undefined) logProbs.push(logProbOf(end))
    stats.finishReason = end === undefined ? 'length' : 'stop'
  })
}

describe('tokens that are parts of characters', () => {
  // As in OpenAI's API: "bytes:" only in completions, with the offset of the character.
  test('are written as bytes in completions', async () => {
    const { app } = serverThatGenerates(bytewise('é🙂!'))
    const tokens = ['\\xc3', '\\xa9', '\\xf0', '\\x9f', '\\x99', '\\x82'].map(name => `bytes:${name}`)
    const ask = { prompt: '🙂🙂', logprobs: 1 }
    const { choices } = (await (await app.request('/v1/completions', post(ask))).json()) as Completion
    expect(choices[0].logprobs).toEqual({
      tokens: [...tokens, '!'],
      token_logprobs: new Array(7).fill(-1),
      top_logprobs: [...tokens, '!'].map(name => ({ [text(77)]: -0.5, [name]: -1 })),
      text_offset: [2, 2, 3, 3, 3, 3, 4],
    })
    const all = (await events(await app.request('/v1/completions', post({ ...ask, stream: true })))) as Completion[]
    const parts = all.slice(0, -1).map(({ choices: [choice] }) => [choice.text, choice.logprobs?.tokens ?? null])
    expect(parts).toEqual([
      ['é', tokens.slice(0, 2)],
      ['🙂', tokens.slice(2)],
      ['!', ['!']],
      ['', null],
    ])
  })

  test('include their bytes in chats', async () => {
    const { app } = serverThatGenerates(bytewise('é'))
    const ask = { messages: [{ role: 'user', content: 'the' }], logprobs: true, top_logprobs: 1 }
    const response = await app.request('/v1/chat/completions', post(ask))
    const { choices } = (await response.json()) as OpenAI.ChatCompletion
    const top = [{ token: text(77), logprob: -0.5, bytes: [...tokenizer.tokenBytes(77)] }]
    expect(choices[0].logprobs).toEqual({
      content: [
        { token: '\\xc3', logprob: -1, bytes: [0xc3], top_logprobs: top },
        { token: '\\xa9', logprob: -1, bytes: [0xa9], top_logprobs: top },
      ],
      refusal: null,
    })
  })
})

test('tokens that are not valid UTF-8 show printable ASCII as it is, and a byte order mark is text', () => {
  const bytes = [
    [0xef, 0xbb, 0xbf],
    [0x20, 0xf0, 0x7e, 0x7f],
    [0x1f, 0x80],
  ]
  const tokenizer = { idToToken: String, tokenBytes: (id: number) => Uint8Array.from(bytes[id]) }
  const tokens = bytes.map((_, id) => ({ id, score: null, offset: 0, isEnd: false }))
  expect(completionLogProbs(tokens, tokenizer as unknown as BpeTokenizer)).toMatchObject({
    tokens: ['\ufeff', 'bytes: \\xf0~\\x7f', 'bytes:\\x1f\\x80'],
    token_logprobs: [null, null, null],
  })
})

test('token ids that the tokenizer does not define have no text', async () => {
  const id = tokenizer.vocabSize + 3
  const { app } = serverThatGenerates(bytewise('a'), { likeliest: id })
  const ask = { messages: [{ role: 'user', content: 'the' }], logprobs: true, top_logprobs: 1 }
  const chat = (await (await app.request('/v1/chat/completions', post(ask))).json()) as OpenAI.ChatCompletion
  const top = [{ token: `token_id:${id}`, logprob: -0.5, bytes: null }]
  expect(chat.choices[0].logprobs?.content?.[0].top_logprobs).toEqual(top)
  const backend = referenceBackend()
  setDefaultBackend(backend)
  const model = new DeepSeek({ ...config, vocab_size: id + 1 }, { seed: 3 })
  const engine = model.continuousBatch()
  const filled = createServer({ model, engine, tokenizer, name: 'tiny' })
  const body = { prompt: [...bytewise('a'), id, ...bytewise('b')], logprobs: 5, echo: true, max_tokens: 0 }
  const { choices } = (await (await filled.request('/v1/completions', post(body))).json()) as Completion
  expect(choices[0].text).toBe('ab')
  expect(choices[0].logprobs?.tokens).toEqual(['a', `token_id:${id}`, 'b'])
  expect(choices[0].logprobs?.text_offset).toEqual([0, 1, 1])
  engine.dispose()
  model.dispose()
  expect(backend.stats().handles).toBe(0)
})

test('completions include the end token, chats do not', async () => {
  const { app } = serverThatGenerates(bytewise('ab'), { end: config.eos_token_id })
  for (const stream of [false, true]) {
    const tokens: unknown[] = []
    const response = await app.request('/v1/completions', post({ prompt: 'the', logprobs: 0, stream }))
    const all = (stream ? (await events(response)).slice(0, -1) : [await response.json()]) as Completion[]
    for (const { choices } of all) tokens.push(...(choices[0].logprobs?.tokens ?? []))
    expect(tokens).toEqual(['a', 'b', '<|end|>'])
    expect(all.map(({ choices }) => choices[0].text).join('')).toBe('ab')
    const ask = { messages: [{ role: 'user', content: 'the' }], logprobs: true, stream }
    const chat = await app.request('/v1/chat/completions', post(ask))
    const chunks = (stream ? (await events(chat)).slice(0, -1) : [await chat.json()]) as ChatCompletionChunk[]
    const content = chunks.flatMap(({ choices }) => choices[0].logprobs?.content ?? [])
    expect(content.map(({ token }) => token)).toEqual(['a', 'b'])
  }
})

test('chats return the log-probabilities of the model, streamed or not', async () => {
  const { app, model, dispose } = modelServer()
  const openai = await openaiOf(app)
  const messages = [{ role: 'user' as const, content: 'the people' }]
  const sampling = { temperature: 0.8, seed: 4 }
  const ask = { model: 'tiny', messages, max_tokens: 9, ...sampling, logprobs: true, top_logprobs: 20 }
  const whole = await openai.chat.completions.create(ask)
  const ids = [...tokenizer.encode('<|begin|><|user|>user: the people<|assistant|>')]
  const generated = await generatedBy(model, ids, { ...sampling, maxTokens: 9 })
  const [score] = await model.score([[...ids, ...generated]], { top: 20 })
  const content = whole.choices[0].logprobs?.content ?? []
  const bytes = (id: number) => [...tokenizer.tokenBytes(id)]
  expect(content.map(({ bytes }) => bytes)).toEqual(generated.map(bytes))
  for (const [i, { logprob, top_logprobs: top }] of content.entries()) {
    const expected = score[ids.length + i] as TokenLogProb
    expectClose([logprob], [expected.logProb])
    expectClose(
      top.map(({ logprob }) => logprob),
      expected.top.map(({ logProb }) => logProb),
    )
    expect(top.map(({ bytes }) => bytes)).toEqual(expected.top.map(({ token }) => bytes(token)))
  }
  const streamed: typeof content = []
  for await (const { choices } of await openai.chat.completions.create({ ...ask, stream: true }))
    for (const { logprobs } of choices) streamed.push(...(logprobs?.content ?? []))
  expect(streamed.map(({ token }) => token)).toEqual(content.map(({ token }) => token))
  expectClose(
    streamed.map(({ logprob }) => logprob),
    content.map(({ logprob }) => logprob),
  )
  const plain = await openai.chat.completions.create({ ...ask, logprobs: false, top_logprobs: 0 })
  expect(plain.choices[0]).toEqual({ ...whole.choices[0], logprobs: null })
  const only = await openai.chat.completions.create({ ...ask, top_logprobs: undefined })
  expect(only.choices[0].logprobs?.content?.map(({ top_logprobs: top }) => top)).toEqual(generated.map(() => []))
  await expect(openai.chat.completions.create({ ...ask, logprobs: undefined })).rejects.toMatchObject({
    status: 400,
    param: 'top_logprobs',
  })
  expect(dispose()).toBe(0)
})

/** Requests of `local-completions` of EleutherAI's lm-evaluation-harness. */
describe('lm-evaluation-harness', () => {
  type Pair = readonly [context: readonly number[], continuation: readonly number[]]
  type Likelihood = readonly [logLikelihood: number, isGreedy: boolean]

  async function likelihoods(app: { request: typeof fetch }, pairs: readonly Pair[], batch: number) {
    const found: Likelihood[] = []
    for (let at = 0; at < pairs.length; at += batch) {
      const chunk = pairs.slice(at, at + batch)
      const payload = {
        model: 'tiny',
        prompt: chunk.map(([context, continuation]) => [...context, ...continuation]),
        temperature: 0,
        max_tokens: 1,
        logprobs: 1,
        seed: 1234,
        echo: true,
      }
      const response = await app.request('/v1/completions', post(payload))
      expect(response.status).toBe(200)
      const { choices } = (await response.json()) as Completion
      const sorted = choices.toSorted((a, b) => a.index - b.index)
      for (const [i, [context]] of chunk.entries()) {
        const logProbs = sorted[i].logprobs
        // The last entry is that of the generated token.
        const own = logProbs?.token_logprobs?.slice(context.length, -1) ?? []
        const tops = logProbs?.top_logprobs?.slice(context.length, -1) ?? []
        const isGreedy = own.every((value, i) => value === Math.max(...Object.values(tops[i])))
        found.push([own.reduce((sum, value) => sum + value, 0), isGreedy])
      }
    }
    return found
  }

  const ids = (text: string) => [...tokenizer.encode(text)]
  const continuations = ['the people', ' of our nature', '🙂', ' f', 'ür alle', 'angels: the better angels']

  test.each([
    ['with one end token', {}],
    [
      'for which every token is an end token',
      { eos_token_id: Array.from({ length: config.vocab_size }, (_, id) => id) },
    ],
  ])('gets the likelihoods that score returns, from a model %s', async (_name, changes) => {
    const backend = referenceBackend()
    setDefaultBackend(backend)
    const model = new DeepSeek({ ...config, ...changes }, { seed: 3 })
    const engine = model.continuousBatch({ maxTexts: 3 })
    const app = createServer({ model, engine, tokenizer, name: 'tiny' }) as unknown as { request: typeof fetch }
    const contexts = ['the better', 'alle ', 'a', '🙂 für alle']
    const pairs: Pair[] = contexts.flatMap(context => continuations.map(text => [ids(context), ids(text)] as const))
    // Greedy continuations, and a window of a text after the begin token.
    for (const context of contexts) {
      const [[, first]] = await model.score([[...ids(context), 0]], { top: 1 }).then(([scored]) => [scored.slice(-2)])
      pairs.push([ids(context), [first?.top[0].token as number]])
    }
    pairs.push([[config.bos_token_id as number], ids('the better angels of our nature')])
    const scores = await model.score(
      pairs.map(([context, continuation]) => [...context, ...continuation]),
      { top: 1 },
    )
    const expected = scores.map((score, i): Likelihood => {
      const continuation = score.slice(pairs[i][0].length) as TokenLogProb[]
      return [
        continuation.reduce((sum, { logProb }) => sum + logProb, 0),
        continuation.every(one => one.token === one.top[0].token),
      ]
    })
    for (const batch of [1, 8]) {
      const found = await likelihoods(app, pairs, batch)
      expectClose(
        found.map(([value]) => value),
        expected.map(([value]) => value),
      )
      expect(found.map(([, isGreedy]) => isGreedy)).toEqual(expected.map(([, isGreedy]) => isGreedy))
    }
    expect(expected.filter(([, isGreedy]) => isGreedy).length).toBeGreaterThanOrEqual(contexts.length)
    expect(expected.some(([, isGreedy]) => !isGreedy)).toBe(true)
    engine.dispose()
    model.dispose()
    expect(backend.stats().handles).toBe(0)
  })

  test('gets greedy texts up to a stop string for prompts of token ids', async () => {
    const { app, model, dispose } = modelServer()
    const prompts = ['the people', 'alle'].map(ids)
    const until = ['\n\n', 'Question:', '</s>', '<|im_end|>', '🙂', '<|end|>']
    const ask = { prompt: prompts, model: 'tiny', max_tokens: 12, temperature: 0, stop: until, seed: 1234 }
    const { choices } = (await (await app.request('/v1/completions', post(ask))).json()) as Completion
    for (const [i, prompt] of prompts.entries()) {
      let text = ''
      for await (const part of model.generate(prompt, { tokenizer, maxTokens: 12, stop: until })) text += part
      expect(choices[i].text).toBe(text)
    }
    expect(dispose()).toBe(0)
  })
})
