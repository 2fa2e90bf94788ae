import { defaultBackend, setDefaultBackend, type Tensor, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { describe, expect, test } from 'vitest'
import type { LayerOptions } from './decoder-layer.ts'
import { DeepSeek, type GenerateOptions, type TextTokenizer } from './index.ts'
import { limits } from './session.ts'
import { tiny } from './test-tiny.ts'

setDefaultBackend(referenceBackend())

describe('generation', () => {
  const prompt = [3, 7, 11, 2, 30]

  test('can be iterated once, and does not restart after stopping early', async () => {
    const model = new DeepSeek(tiny, { seed: 1 })
    const generation = model.generate(prompt, { maxTokens: 8 })
    const generated: number[] = []
    for await (const id of generation) {
      generated.push(id)
      if (generated.length === 3) break
    }
    for await (const id of generation) generated.push(id)
    expect(generated).toHaveLength(3)
    model.dispose()
  })

  test('greedy decoding chooses the most likely tokens of full forward passes', async () => {
    const model = new DeepSeek(tiny, { seed: 1 })
    const ids = prompt.slice()
    for (let i = 0; i < 20; i++) {
      const logits = await model.infer(() => model.forward(tensor(Int32Array.from(ids), [1, ids.length]))).values()
      const last = logits.subarray(logits.length - 40)
      ids.push(last.indexOf(Math.max(...last)))
    }
    const generated: number[] = []
    for await (const id of model.generate(prompt, { maxTokens: 20 })) generated.push(id)
    expect(generated).toEqual(ids.slice(prompt.length))
    model.dispose()
  })

  for (const depth of [1, 2, 3]) {
    test(`speculative decoding with ${depth} modules gives the same tokens as without`, async () => {
      const handles = defaultBackend().stats().handles
      for (let seed = 0; seed < 4; seed++) {
        const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: depth }, { seed })
        const plain: number[] = []
        const byItself = model.generate(prompt, { maxTokens: 40 })
        for await (const id of byItself) plain.push(id)
        expect(byItself.stats).toMatchObject({ drafted: [], steps: 40 })
        const generation = model.generate(prompt, { maxTokens: 40, speculative: true })
        const speculative: number[] = []
        for await (const id of generation) speculative.push(id)
        expect(speculative).toEqual(plain)
        expect(generation.stats.tokens).toBe(40)
        expect(generation.stats.drafted[0]).toBeGreaterThan(0)
        model.dispose()
      }
      expect(defaultBackend().stats().handles).toBe(handles)
    })
  }

  test('a long prompt is processed in pieces, with the same text and drafts, and can be aborted between them', async () => {
    const long = Array.from({ length: 30 }, (_, i) => (i * 7) % 40)
    const handles = defaultBackend().stats().handles
    const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { seed: 4 })
    const text = async (options: GenerateOptions) => {
      const generation = model.generate(long, { maxTokens: 30, ...options })
      const generated: number[] = []
      for await (const id of generation) generated.push(id)
      return { generated, drafted: generation.stats.drafted, steps: generation.stats.steps }
    }
    const all = async () => [
      await text({}),
      await text({ speculative: true }),
      await text({ speculative: true, cacheDtype: 'bf16' }),
    ]
    const whole = await all()
    expect(whole[1].drafted[0]).toBeGreaterThan(0)
    const usual = limits.prefillChunkSize
    try {
      for (limits.prefillChunkSize of [1, 7, 29, 30]) {
        expect(await all()).toEqual(whole)
      }
      limits.prefillChunkSize = 5
      const abort = new AbortController()
      setImmediate(() => abort.abort())
      await expect(text({ speculative: true, signal: abort.signal })).rejects.toMatchObject({ code: 'E_ABORTED' })
    } finally {
      limits.prefillChunkSize = usual
    }
    model.dispose()
    expect(defaultBackend().stats().handles).toBe(handles)
  })

  test('memory of a pass without gradients does not grow with the layers', async () => {
    const peak = async (layers: number, options: LayerOptions = {}) => {
      const backend = referenceBackend()
      const model = new DeepSeek({ ...tiny, num_hidden_layers: layers, num_nextn_predict_layers: 0 }, { backend })
      const ids = tensor(
        Int32Array.from({ length: 64 }, (_, i) => i % 40),
        [1, 64],
        { backend },
      )
      const before = backend.stats().bytes
      const logits = model.infer(() => model.lm_head.forward(model.hidden(ids, options)))
      const { peakBytes } = backend.stats()
      const values = await logits.values()
      return { bytes: peakBytes - before, values }
    }
    const [few, many] = [await peak(2), await peak(6)]
    expect(many.bytes).toBeLessThan(1.05 * few.bytes)
    // A listener of loads keeps them in memory.
    const loads: Tensor[] = []
    const watched = await peak(6, { onLoad: load => loads.push(load) })
    expect(watched.values).toEqual(many.values)
    expect(loads.length).toBeGreaterThan(0)
  })

  test('speculative decoding with a bf16 cache gives the same tokens as without', async () => {
    const handles = defaultBackend().stats().handles
    const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { seed: 6 })
    const text = async (speculative: boolean) => {
      const generated: number[] = []
      const options = { maxTokens: 40, speculative, cacheDtype: 'bf16' } as const
      for await (const id of model.generate(prompt, options)) generated.push(id)
      return generated
    }
    expect(await text(true)).toEqual(await text(false))
    expect((await text(false)).length).toBe(40)
    model.dispose()
    expect(defaultBackend().stats().handles).toBe(handles)
  })

  test('a model that repeats itself accepts its drafts', async () => {
    // A head of zeros, so that every depth predicts token 0.
    const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { seed: 3 })
    const head = new Float32Array(40 * 24)
    model.lm_head.weight.assign(tensor(head, [40, 24]))
    const generation = model.generate(prompt, { maxTokens: 30, speculative: true })
    for await (const id of generation) expect(id).toBe(0)
    expect(generation.stats.accepted).toEqual(generation.stats.drafted)
    expect(generation.stats.steps).toBeLessThanOrEqual(11)
    model.dispose()
  })

  test.each([false, true])(
    'stops at ids and, with a tokenizer, at strings, wherever tokens end (drafts: %s)',
    async speculative => {
      const options = { maxTokens: 30, speculative }
      const model = new DeepSeek(tiny, { seed: 1 })
      const ids: number[] = []
      for await (const id of model.generate(prompt, options)) ids.push(id)
      const before = ids.slice(0, ids.indexOf(ids[6]))
      const seen: number[] = []
      const cut: number[] = []
      for await (const id of model.generate(prompt, { ...options, stop: [ids[6]], onToken: id => seen.push(id) })) {
        cut.push(id)
      }
      expect(cut).toEqual(before)
      expect(seen).toEqual(before)

      // Every token has two characters, so that a stop string may begin in one and end in the next.
      const word = (id: number) => `${id}`.padStart(2, '0')
      const tokenizer = { createDecodeStream: () => ({ push: word, end: () => '' }) }
      const whole = ids.map(word).join('')
      const handles = defaultBackend().stats().handles
      for (const stop of [[whole.slice(9, 14)], [whole.slice(20, 21)], ['no such text', whole.slice(3, 8)], ['99x']]) {
        const pieces: string[] = []
        for await (const text of model.generate(prompt, { ...options, tokenizer, stop })) pieces.push(text)
        const ends = stop.map(text => whole.indexOf(text)).filter(at => at >= 0)
        expect(pieces.join('')).toBe(ends.length > 0 ? whole.slice(0, Math.min(...ends)) : whole)
        expect(pieces).not.toContain('')
      }
      for await (const _ of model.generate(prompt, { speculative })) break
      expect(defaultBackend().stats().handles).toBe(handles)
      expect(() => model.generate(prompt, { stop: ['end'] })).toThrow(
        /stop contains the string "end", but there is no tokenizer/,
      )
      expect(() => model.generate(prompt, { stop: [''], tokenizer })).toThrow(/a stop string is empty/)
      model.dispose()
    },
  )

  test('minP of 1 keeps the most likely token, onToken receives each token, and stats has tokens per pass', async () => {
    const model = new DeepSeek(tiny, { seed: 2 })
    const greedy: number[] = []
    for await (const id of model.generate(prompt, { maxTokens: 12 })) greedy.push(id)
    const received: number[] = []
    const generation = model.generate(prompt, {
      maxTokens: 12,
      temperature: 5,
      minP: 1,
      seed: 9,
      speculative: true,
      onToken: id => received.push(id),
    })
    // minP of 1 keeps only the most likely token at any temperature.
    for await (const _ of generation);
    expect(received).toEqual(greedy)
    expect(generation.stats.tokensPerStep).toBe(12 / generation.stats.steps)
    model.dispose()
  })

  test('invalid requests are rejected', async () => {
    const model = new DeepSeek(tiny)
    expect(() => model.generate([])).toThrow(/prompt is empty/)
    expect(() => model.generate([40])).toThrow(/token 0 is 40, outside the vocabulary of 40/)
    expect(() => model.generate([1], { temperature: -1, topP: 2 })).toThrow(
      /temperature = -1, expected a finite number of at least 0; topP = 2/,
    )
    expect(() => model.generate([1], { temperature: Infinity })).toThrow(/temperature = Infinity, expected a finite/)
    expect(() => model.generate([1], { topP: 0.9 })).toThrow(
      /without a temperature, topP would have no effect; pass temperature: 1/,
    )
    expect(() => model.generate([1], { topK: 5 })).toThrow(
      /without a temperature, topK would have no effect; pass temperature: 1/,
    )
    const text = '2' as unknown as number // As from a form.
    expect(() => model.generate([1], { maxTokens: text })).toThrow('expected a whole number for maxTokens, got "2"')
    expect(() => model.generate([1], { maxTokens: 2.5 })).toThrow('expected a whole number for maxTokens, got 2.5')
    expect(() => model.generate([1], { temperature: text, topP: text, minP: text, repetitionPenalty: text })).toThrow(
      /temperature = "2", .*; topP = "2", .*; minP = "2", .*; repetitionPenalty = "2",/,
    )
    for (const topK of [0, -1, 2.5, Number.NaN])
      expect(() => model.generate([1], { temperature: 1, topK })).toThrow(`topK = ${topK}, expected a positive integer`)
    for (const seed of [1.5, Number.NaN, 2 ** 53, text])
      expect(() => model.generate([1], { temperature: 1, seed })).toThrow(/seed = .*, expected an integer below 2\^53/)
    for (const repetitionPenalty of [0, -1, Number.NaN, Infinity])
      expect(() => model.generate([1], { repetitionPenalty })).toThrow(
        /repetitionPenalty = .*, expected a positive number/,
      )
    for (const penalty of [2.1, -2.1, Number.NaN, text])
      for (const name of ['frequencyPenalty', 'presencePenalty'] as const)
        expect(() => model.generate([1], { [name]: penalty })).toThrow(`${name} = `)
    const wrong: unknown[] = [
      { 1: 101 },
      { 1: Number.NaN },
      { 1: text },
      { '-1': 1 },
      { '1.5': 1 },
      { '01': 1 },
      5,
      [[1]],
      null,
    ]
    for (const logitBias of wrong)
      expect(() => model.generate([1], { logitBias: logitBias as Record<number, number> })).toThrow(
        /logitBias = .*, expected numbers from -100 to 100 by token id/,
      )
    expect(() => model.generate([1], { logitBias: { [model.config.vocab_size]: 1 } })).toThrow(
      `logitBias contains token ${model.config.vocab_size}, outside the vocabulary of ${model.config.vocab_size}`,
    )
    const precision = 'half' as 'bf16'
    for (const call of [() => model.generate([1], { precision }), () => model.session({ precision })])
      expect(call).toThrow(`session: unknown precision "half"; pass 'f32', 'bf16' or 'fp8'`)
    const plain = new DeepSeek({ ...tiny, num_nextn_predict_layers: 0 })
    for (const call of [
      () => plain.generate([1], { speculative: true }),
      () => plain.session({ speculative: true }),
      () => plain.continuousBatch({ speculative: true }),
    ])
      expect(call).toThrow('the model has no MTP modules')
    plain.dispose()
    // Other seeds would give the same text.
    expect(() => model.generate([1], { seed: 3 })).toThrow(
      /without a temperature, seed would have no effect; pass temperature: 1/,
    )
    model.generate([1], { seed: 3, temperature: 0 })
    expect(() => model.generate('hello' as unknown as number[])).toThrow(/got a string; pass tokenizer.encode/)
    for (const none of [undefined, null, 5, tensor([1])] as unknown[])
      expect(() => model.generate(none as number[])).toThrow(
        /expected the token ids of the prompt, got .*; pass tokenizer.encode/,
      )
    const several = [[1, 2], [3]] as unknown as number[]
    expect(() => model.generate(several)).toThrow(
      /expected the token ids of one prompt, got a list of prompts; call generate for each/,
    )
    expect(() => model.generate([1], { tokenizer: {} as TextTokenizer })).toThrow(
      /no createDecodeStream; pass a tokenizer of/,
    )
    const signal = new AbortController() as unknown as AbortSignal
    expect(() => model.generate([1], { signal })).toThrow(/not an AbortSignal; pass the .signal of an AbortController/)
    expect(() => model.generate([1], null as unknown as GenerateOptions)).toThrow(
      /expected an options object, got null/,
    )
    const stop = '.' as unknown as string[]
    expect(() => model.generate([1], { stop })).toThrow(/stop is "\."; pass an array of token ids and strings/)
    const aborted = model.generate([1], { signal: AbortSignal.abort() })
    await expect(aborted[Symbol.asyncIterator]().next()).rejects.toMatchObject({ code: 'E_ABORTED' })
    model.dispose()
    const message = expect.stringMatching(/the parameter was freed with its model/)
    await expect(model.generate([1])[Symbol.asyncIterator]().next()).rejects.toMatchObject({
      code: 'E_DISPOSED',
      message,
    })
  })
})
