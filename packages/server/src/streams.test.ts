/** @file The parts of streamed texts: complete characters, and no stop strings. */
import { Random, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { DeepSeek } from '@moe/deepseek'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ChatCompletionChunk, Completion } from 'openai/resources'
import { describe, expect, test } from 'vitest'
import { createServer } from './index.ts'
import { bytewise, config, events, modelServer, post, tokenizer } from './test-server.ts'

const _paths = ['/v1/completions', '/v1/chat/completions'] as const

/** A server whose decoder replaces the tokens of the model by given ones. */
function serverWithTokens() {
  const backend = referenceBackend()
  setDefaultBackend(backend)
  const model = new DeepSeek({ ...config, eos_token_id: undefined }, { seed: 3 })
  const engine = model.continuousBatch({ maxTexts: 3 })
  let tokens: readonly number[] = []
  const replaced = {
    encode: (text: string) => tokenizer.encode(text),
    createDecodeStream(options: object) {
      const [ids, stream] = [tokens, tokenizer.createDecodeStream(options)]
      let at = 0
      return { push: () => stream.push(ids[at++]), end: () => stream.end() }
    },
  }
  const app = createServer({ model, engine, tokenizer: replaced as unknown as BpeTokenizer, name: 'tiny' })
  const dispose = () => {
    engine.dispose()
    model.dispose()
    return backend.stats().handles
  }
  /** The text of these tokens, its streamed parts, and the finish reason. */
  const generate = async (ids: readonly number[], stop: readonly string[]) => {
    tokens = ids
    const ask = { prompt: [1], max_tokens: ids.length, stop }
    const whole = (await (await app.request('/v1/completions', post(ask))).json()) as Completion
    const response = await app.request('/v1/completions', post({ ...ask, stream: true }))
    const all = (await events(response)) as [...Completion[], unknown]
    expect(all.pop()).toBe('[DONE]')
    const choices = (all as Completion[]).map(({ choices: [choice] }) => choice)
    const end = choices.pop()
    expect(end?.text).toBe('')
    expect(end?.finish_reason).toBe(whole.choices[0].finish_reason)
    expect(choices.every(({ finish_reason: none }) => none === null)).toBe(true)
    const parts = choices.map(({ text }) => text)
    expect(parts.join('')).toBe(whole.choices[0].text)
    return { parts, text: parts.join(''), reason: end?.finish_reason, tokens: whole.usage?.completion_tokens }
  }
  return { generate, dispose }
}

describe('streamed texts', () => {
  test('contain complete characters and no stop strings, wherever tokens end', async () => {
    const { generate, dispose } = serverWithTokens()
    const random = new Random(5)
    const characters = ['a', 'b', 'ab', 'é', 'ü', '€', '、', '🙂', '👍🏽', ' ']
    const randomCharacters = (min: number, max: number) =>
      Array.from({ length: min + random.integer(max - min + 1) }, () => characters[random.integer(characters.length)])
    let stopped = 0
    for (let i = 0; i < 80; i++) {
      const text = randomCharacters(3, 9).join('')
      const ids = random.next() < 0.7 ? bytewise(text) : [...tokenizer.encode(text)]
      if (ids.length > 60) continue
      const stops = Array.from({ length: random.integer(4) }, () => {
        const whole = [...text]
        const at = random.integer(whole.length)
        return random.next() < 0.8
          ? whole.slice(at, at + 1 + random.integer(3)).join('')
          : randomCharacters(1, 2).join('')
      })
      // The smallest number of tokens whose text contains a stop string.
      let [expected, tokens] = [text, ids.length]
      for (let n = 1; n <= ids.length; n++) {
        const prefix = tokenizer.decode(ids.slice(0, n)).replace(/\ufffd$/, '')
        const ats = stops.map(stop => prefix.indexOf(stop)).filter(at => at >= 0)
        if (ats.length === 0) continue
        ;[expected, tokens] = [prefix.slice(0, Math.min(...ats)), n]
        break
      }
      const ends = stops.some(stop => text.includes(stop))
      if (ends) stopped++
      const about = JSON.stringify({ text, stops, ids })
      const generated = await generate(ids, stops)
      expect(generated, about).toMatchObject({ text: expected, reason: ends ? 'stop' : 'length', tokens })
      for (const part of generated.parts) {
        expect(part.length, about).toBeGreaterThan(0)
        expect(part, about).not.toMatch(/\ufffd|^[\udc00-\udfff]|[\ud800-\udbff]$/)
      }
    }
    expect(stopped).toBeGreaterThan(20)
    expect(stopped).toBeLessThan(75)
    expect(dispose()).toBe(0)
  })

  test('withhold a partial stop string only while it may still be completed', async () => {
    const { generate, dispose } = serverWithTokens()
    expect((await generate(bytewise('abcabd'), ['abcabc'])).text).toBe('abcabd')
    expect((await generate(bytewise('aab'), ['ab'])).parts).toEqual(['a'])
    expect(await generate(bytewise('xab'), ['abc'])).toMatchObject({ parts: ['x', 'ab'], reason: 'length' })
    expect(await generate(bytewise('🙂'), ['🙂'])).toMatchObject({ parts: [], reason: 'stop', tokens: 4 })
    expect(await generate(bytewise('a🙂!'), ['🙂!'])).toMatchObject({ parts: ['a'], reason: 'stop', tokens: 6 })
    dispose()
  })

  test('end with one replacement character if the token limit cuts a character', async () => {
    const { generate, dispose } = serverWithTokens()
    for (const n of [1, 2, 3]) {
      const generated = await generate(bytewise('a🙂').slice(0, 1 + n), ['b'])
      expect(generated).toMatchObject({ parts: ['a', '\ufffd'], reason: 'length' })
    }
    dispose()
  })

  test('do not contain special tokens, which do not match stop strings', async () => {
    const { generate, dispose } = serverWithTokens()
    const special = tokenizer.tokenToId('<|user|>') as number
    const generated = await generate([...bytewise('a'), special, ...bytewise('b')], ['<|user|>'])
    expect(generated).toMatchObject({ text: 'ab', reason: 'length' })
    dispose()
  })

  test('of chats start with the role, end with the finish reason, and contain only text between', async () => {
    const { app, dispose } = modelServer()
    const path = '/v1/chat/completions'
    const response = await app.request(
      path,
      post({ messages: [{ role: 'user', content: 'the' }], stream: true, n: 2, max_tokens: 8, seed: 1 }),
    )
    const all = (await events(response)) as [...ChatCompletionChunk[], unknown]
    expect(all.pop()).toBe('[DONE]')
    for (const index of [0, 1]) {
      const own = (all as ChatCompletionChunk[]).map(({ choices: [choice] }) => choice).filter(c => c.index === index)
      expect(own[0]).toMatchObject({ delta: { role: 'assistant', content: '' }, finish_reason: null })
      expect(own[own.length - 1]).toMatchObject({ delta: {}, finish_reason: expect.stringMatching(/^(stop|length)$/) })
      for (const { delta, finish_reason: none } of own.slice(1, -1)) {
        expect([Object.keys(delta), none]).toEqual([['content'], null])
        expect(delta.content).not.toBe('')
      }
    }
    expect(dispose()).toBe(0)
  })
})
