import { trainBpe } from '@moe/tokenizer-bpe'
import type { Completion } from 'openai/resources'
import { describe, expect, test } from 'vitest'
import { events, modelServer, post, scriptedServer, tokenizer } from './test-server.ts'

describe('POST /v1/completions', () => {
  test('returns the text that the model generates', async () => {
    const { app, model, records, dispose } = modelServer()
    const prompt = 'the people'
    const response = await app.request(
      '/v1/completions',
      post({ model: 'tiny', prompt, max_tokens: 12, temperature: 0 }),
    )
    expect(response.status).toBe(200)
    const body = await response.json()
    let text = ''
    const generation = model.generate(tokenizer.encode(prompt), { tokenizer, maxTokens: 12 })
    for await (const part of generation) text += part
    const { tokens } = generation.stats
    expect(body).toEqual({
      id: expect.stringMatching(/^cmpl-/),
      object: 'text_completion',
      created: expect.any(Number),
      model: 'tiny',
      choices: [{ index: 0, text, logprobs: null, finish_reason: tokens < 12 ? 'stop' : 'length' }],
      usage: {
        prompt_tokens: tokenizer.encode(prompt).length,
        completion_tokens: tokens,
        total_tokens: tokenizer.encode(prompt).length + tokens,
        prompt_tokens_details: { cached_tokens: 0 },
      },
    })
    expect(records).toMatchObject([{ method: 'POST', path: '/v1/completions', status: 200, generatedTokens: tokens }])
    expect(dispose()).toBe(0)
  })

  test('streams the same text, its finish reason and its usage', async () => {
    const { app, dispose } = modelServer()
    const ask = { prompt: 'the people', max_tokens: 12, temperature: 0.9, seed: 5, n: 2 }
    const whole = (await (await app.request('/v1/completions', post(ask))).json()) as Completion
    const streamed = { ...ask, stream: true, stream_options: { include_usage: true } }
    const response = await app.request('/v1/completions', post(streamed))
    expect(response.headers.get('content-type')).toBe('text/event-stream')
    const all = (await events(response)) as [...Completion[], unknown]
    expect(all.pop()).toBe('[DONE]')
    const { usage, choices, ...head } = all.pop() as Completion
    expect(choices).toEqual([])
    expect({ ...usage, prompt_tokens_details: null }).toEqual({ ...whole.usage, prompt_tokens_details: null })
    const texts = ['', '']
    const ends: unknown[] = []
    for (const {
      choices: [choice],
      usage,
      ...same
    } of all as Completion[]) {
      expect([same, usage]).toEqual([head, null])
      texts[choice.index] += choice.text
      if (choice.finish_reason) ends[choice.index] = choice.finish_reason
    }
    expect(texts).toEqual(whole.choices.map(choice => choice.text))
    expect(texts[0]).not.toBe(texts[1])
    expect(ends).toEqual(whole.choices.map(choice => choice.finish_reason))
    expect(dispose()).toBe(0)
  })

  test('counts tokens of all texts, and those of a prompt and its cached part once', async () => {
    let calls = 0
    const { app, records } = scriptedServer(async function* (_, stats) {
      stats.cachedTokens = ++calls
      stats.tokens = 10
      yield 'so'
      if (calls > 6) throw new Error('broken')
    })
    const ask = { prompt: [[1, 2, 3], [4], [5, 6]], n: 2 }
    const { usage } = (await (await app.request('/v1/completions', post(ask))).json()) as Completion
    expect(usage).toMatchObject({ prompt_tokens: 6, completion_tokens: 60, total_tokens: 66 })
    // Of the first text of each prompt: others may find more in the cache.
    expect(usage?.prompt_tokens_details).toEqual({ cached_tokens: 1 + 3 + 5 })
    await (await app.request('/v1/completions', post({ prompt: [1, 2], stream: true }))).text()
    expect(records).toMatchObject([
      { promptTokens: 6, generatedTokens: 60, finishReasons: new Array(6).fill('stop') },
      { promptTokens: 2, generatedTokens: 10, status: 500 },
    ])
  })

  test('fills the gap before a suffix', async () => {
    const specialTokens = ['<｜fim▁begin｜>', '<｜fim▁hole｜>', '<｜fim▁end｜>']
    const infilling = trainBpe(['the better angels of our nature'], { vocabSize: 270, specialTokens })
    async function* script() {
      yield ' better '
    }
    const { app, engine } = scriptedServer(script, { tokenizer: infilling })
    const ask = async (body: object) => {
      const response = await app.request('/v1/completions', post(body))
      return (await response.json()) as Completion & { error?: { message: string; param: string } }
    }
    const gap = { prompt: ['the', 'our'], suffix: 'angels' }
    expect((await ask(gap)).choices.map(({ text }) => text)).toEqual([' better ', ' better '])
    const [begin, hole, end] = specialTokens.map(token => infilling.tokenToId(token) as number)
    const suffix = [...infilling.encode('angels')]
    for (const [i, prefix] of ['the', 'our'].entries())
      expect(engine.calls[i].ids).toEqual([begin, ...infilling.encode(prefix), hole, ...suffix, end])
    await ask({ prompt: 'the', suffix: '' })
    expect(engine.calls[2].ids).toEqual([...infilling.encode('the')])
    expect((await ask({ ...gap, echo: true })).error).toMatchObject({ param: 'suffix' })
    expect((await ask({ ...gap, prompt: [1, 2] })).error?.message).toContain('a prompt of text')
  })
})
