import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { cacheCost } from '@moe/attention-mla'
import { readSafetensors } from '@moe/checkpoint'
import {
  backward,
  defaultBackend,
  namedParameters,
  Random,
  scope,
  setDefaultBackend,
  type Tensor,
  tensor,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { auxFree, combineBalancers, expertLevel, LoadMonitor } from '@moe/router'
import { afterAll, describe, expect, test } from 'vitest'
import type { LayerOptions } from './decoder-layer.ts'
import {
  countParameters,
  DeepSeek,
  type GenerateOptions,
  loadWeights,
  parseConfig,
  presets,
  type TextTokenizer,
} from './index.ts'
import { limits } from './session.ts'
import { tiny } from './test-tiny.ts'

setDefaultBackend(referenceBackend())

const folder = await mkdtemp(join(tmpdir(), 'moe-deepseek-'))
afterAll(() => rm(folder, { recursive: true }))

test('a checkpoint is opened without drawing random weights', async () => {
  const model = new DeepSeek(tiny, { seed: 1 })
  const at = join(folder, 'undrawn')
  await model.save(at)
  const { normal } = Random.prototype
  Random.prototype.normal = () => {
    throw new Error('drawn')
  }
  const again = await DeepSeek.fromPretrained(at).finally(() => {
    Random.prototype.normal = normal
  })
  for (const loaded of [again, await DeepSeek.fromPretrained(at, { weights: 'int8' })]) {
    expect(loaded.config.initializer_range).toBe(model.config.initializer_range)
    loaded.dispose()
  }
  model.dispose()
})

describe('generation', () => {
  const prompt = [3, 7, 11, 2, 30]

  test('can be read once: stopping early does not restart it', async () => {
    const model = new DeepSeek(tiny, { seed: 1 })
    const generation = model.generate(prompt, { maxTokens: 8 })
    const made: number[] = []
    for await (const id of generation) {
      made.push(id)
      if (made.length === 3) break
    }
    for await (const id of generation) made.push(id)
    expect(made).toHaveLength(3)
    model.dispose()
  })

  test('greedy equals the most likely token of a full forward pass each time', async () => {
    const model = new DeepSeek(tiny, { seed: 1 })
    const ids = prompt.slice()
    for (let i = 0; i < 20; i++) {
      const logits = await model.infer(() => model.forward(tensor(Int32Array.from(ids), [1, ids.length]))).values()
      const last = logits.subarray(logits.length - 40)
      ids.push(last.indexOf(Math.max(...last)))
    }
    const made: number[] = []
    for await (const id of model.generate(prompt, { maxTokens: 20 })) made.push(id)
    expect(made).toEqual(ids.slice(prompt.length))
    model.dispose()
  })

  for (const depth of [1, 2, 3]) {
    test(`speculative equals plain, token for token, at depth ${depth}`, async () => {
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

  test('a long prompt is processed in pieces, which do not change text or drafts, and can be aborted between', async () => {
    const long = Array.from({ length: 30 }, (_, i) => (i * 7) % 40)
    const handles = defaultBackend().stats().handles
    const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { seed: 4 })
    const text = async (options: GenerateOptions) => {
      const generation = model.generate(long, { maxTokens: 30, ...options })
      const made: number[] = []
      for await (const id of generation) made.push(id)
      return { made, drafted: generation.stats.drafted, steps: generation.stats.steps }
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
    // Who watches the loads keeps what was made.
    const loads: Tensor[] = []
    const watched = await peak(6, { onLoad: load => loads.push(load) })
    expect(watched.values).toEqual(many.values)
    expect(loads.length).toBeGreaterThan(0)
  })

  test('over a bf16 cache, speculative equals plain too', async () => {
    const handles = defaultBackend().stats().handles
    const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { seed: 6 })
    const text = async (speculative: boolean) => {
      const made: number[] = []
      const options = { maxTokens: 40, speculative, cacheDtype: 'bf16' } as const
      for await (const id of model.generate(prompt, options)) made.push(id)
      return made
    }
    expect(await text(true)).toEqual(await text(false))
    expect((await text(false)).length).toBe(40)
    model.dispose()
    expect(defaultBackend().stats().handles).toBe(handles)
  })

  test('a model that repeats itself accepts its drafts', async () => {
    // Head and embedding that ignore the context: every depth predicts token 5.
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
    'stops at ids and, with a tokenizer, at strings wherever their tokens break (drafts: %s)',
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

      // Every token is two characters: a stop string may begin in one and end in the next.
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

  test('minP keeps likely tokens only, onToken receives each one, stats count tokens per pass', async () => {
    const model = new DeepSeek(tiny, { seed: 2 })
    const greedy: number[] = []
    for await (const id of model.generate(prompt, { maxTokens: 12 })) greedy.push(id)
    const told: number[] = []
    const generation = model.generate(prompt, {
      maxTokens: 12,
      temperature: 5,
      minP: 1,
      seed: 9,
      speculative: true,
      onToken: id => told.push(id),
    })
    // minP 1 leaves the likeliest token alone, whatever the temperature.
    for await (const _ of generation);
    expect(told).toEqual(greedy)
    expect(generation.stats.tokensPerStep).toBe(12 / generation.stats.steps)
    model.dispose()
  })

  test('invalid requests are rejected', async () => {
    const model = new DeepSeek(tiny)
    expect(() => model.generate([])).toThrow(/prompt is empty/)
    expect(() => model.generate([40])).toThrow(/token 0 is 40, outside the vocabulary of 40/)
    expect(() => model.generate([1], { temperature: -1, topP: 2 })).toThrow(
      /temperature = -1, expected a number of at least 0; topP = 2/,
    )
    expect(() => model.generate([1], { topP: 0.9 })).toThrow(
      /without a temperature, topP would have no effect; pass temperature: 1/,
    )
    expect(() => model.generate([1], { topK: 5 })).toThrow(
      /without a temperature, topK would have no effect; pass temperature: 1/,
    )
    const text = '2' as unknown as number // As from a form.
    expect(() => model.generate([1], { maxTokens: text })).toThrow('expected a whole number for maxTokens, got "2"')
    expect(() => model.generate([1], { temperature: text, topP: text, minP: text, repetitionPenalty: text })).toThrow(
      /temperature = "2", .*; topP = "2", .*; minP = "2", .*; repetitionPenalty = "2",/,
    )
    for (const topK of [0, -1, 2.5, Number.NaN])
      expect(() => model.generate([1], { temperature: 1, topK })).toThrow(`topK = ${topK}, expected a positive integer`)
    for (const repetitionPenalty of [0, -1, Number.NaN, Infinity])
      expect(() => model.generate([1], { repetitionPenalty })).toThrow(
        /repetitionPenalty = .*, expected a positive number/,
      )
    for (const penalty of [2.1, -2.1, Number.NaN, text])
      for (const name of ['frequencyPenalty', 'presencePenalty'] as const)
        expect(() => model.generate([1], { [name]: penalty })).toThrow(`${name} = `)
    const wrong: unknown[] = [{ 1: 101 }, { 1: Number.NaN }, { 1: text }, { '-1': 1 }, { '1.5': 1 }, 5, [[1]], null]
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

describe('training', () => {
  const random = new Random(3)
  const rows = (documents?: number[]) => ({
    tokens: Int32Array.from({ length: 2 * 10 }, () => random.integer(40)),
    documents: Int32Array.from(documents ?? new Array(20).fill(0)),
    rows: 2,
    length: 10,
  })
  const total = async (load: Tensor | null) => Array.from(await (load as Tensor).values()).reduce((a, b) => a + b, 0)

  test('padding is neither counted nor balanced nor trained on', async () => {
    const model = new DeepSeek(tiny, { seed: 1, objective: { biasSpeed: 0 } })
    // Row 1 ends after its fourth token; padding has negative documents that never repeat.
    const padded = rows(Array.from({ length: 20 }, (_, i) => (i < 14 ? 0 : -i)))
    const { loss, count, metrics } = scope(() => model.loss(padded))
    expect(count).toBe(8 + 3)
    // The MTP layer reads the token after each position.
    expect(await Promise.all(model.moeLayers.map(layer => total(layer.load)))).toEqual([(8 + 4) * 2, (8 + 3) * 2])
    await model.afterStep()
    // What stands in the padding changes nothing.
    const other = { ...padded, tokens: padded.tokens.map((token, i) => (i < 14 ? token : 1)) }
    const again = scope(() => model.loss(other))
    expect(await again.metrics.balance.item()).toBeCloseTo(await metrics.balance.item(), 6)
    expect(await again.loss.item()).toBeCloseTo(await loss.item(), 6)
    model.dispose()
  })

  test('a balancer replaces the objective; the monitor receives loads and biases', async () => {
    const monitor = new LoadMonitor({ topK: 2, groups: 4 })
    const balancer = combineBalancers(auxFree({ speed: step => (step === 0 ? 0.5 : 0) }), expertLevel({ alpha: 3 }))
    const model = new DeepSeek(tiny, { seed: 1, balancer, monitor, objective: { balanceWeight: 100, mtpWeight: 0 } })
    const batch = rows()
    const { loss, nll, metrics, count } = scope(() => model.loss(batch))
    const extra = (await loss.item()) - (await nll.item()) / count
    expect(extra).toBeCloseTo((await metrics.balance.item()) * model.moeLayers.length, 4)
    // At least the factor: balance costs 1 when perfect.
    expect(extra).toBeGreaterThan(2.5 * model.moeLayers.length)
    await model.afterStep()
    expect(model.step).toBe(1)
    const reports = monitor.report()
    expect(reports).toHaveLength(model.moeLayers.length)
    expect(reports[0]).toMatchObject({ total: 32, bias: { min: -0.5, max: 0.5 } })
    model.dispose()
  })

  test('setting the step sets that of the balancer and the schedules', () => {
    const seen: number[] = []
    const loss = (_: unknown, step: number) => {
      seen.push(step)
      return null
    }
    const balancer = { loss }
    const model = new DeepSeek(tiny, { seed: 1, balancer })
    model.step = 7
    scope(() => model.loss(rows()))
    expect(seen).toEqual(model.moeLayers.map(() => 7))
    expect(model.settings).toMatchObject({ vocab_size: tiny.vocab_size, num_experts_per_tok: 2, mtpWeight: 0.3 })
    model.dispose()
  })

  test('λ follows its schedule; detached modules give no gradient to the main model', async () => {
    const batch = rows()
    const parts = async (objective: object, step = 0) => {
      const model = new DeepSeek(tiny, { seed: 1, objective: { balanceWeight: 0, ...objective } })
      model.step = step
      const { loss, nll, count, metrics } = scope(() => {
        const output = model.loss(batch)
        backward(output.loss)
        return { ...output, loss: output.loss.detach() }
      })
      const weight = ((await loss.item()) - (await nll.item()) / count) / (await metrics.mtp.item())
      const gradient = await (model.lm_head.weight.grad as Tensor).values()
      const mtp = model.mtp[0].eh_proj.weight.grad !== null
      model.dispose()
      return { weight, gradient, mtp }
    }
    const schedule = (step: number) => (step < 10 ? 0.3 : 0.1)
    expect((await parts({ mtpWeight: schedule }, 9)).weight).toBeCloseTo(0.3, 4)
    expect((await parts({ mtpWeight: schedule }, 10)).weight).toBeCloseTo(0.1, 4)
    const [without, detached, joint] = [
      await parts({ mtpWeight: 0 }),
      await parts({ mtpWeight: 0.3, mtpDetached: true }),
      await parts({ mtpWeight: 0.3 }),
    ]
    expect(detached.mtp).toBe(true)
    expect(detached.gradient).toEqual(without.gradient)
    expect(joint.gradient).not.toEqual(without.gradient)
  })

  test('acceptance is computed in training on request, and in evaluation', async () => {
    const model = new DeepSeek(
      { ...tiny, num_nextn_predict_layers: 2 },
      { seed: 1, objective: { mtpAcceptance: true } },
    )
    const batch = { ...rows(), rows: 1, length: 20 }
    const { metrics } = scope(() => model.loss(batch))
    const { individual, cumulative } = model.mtpAcceptance(batch)
    for (const [k, rate] of cumulative.entries()) {
      expect(await metrics[`acceptance${k + 1}`].item()).toBe(await rate.item())
      expect(await individual[k].item()).toBeGreaterThanOrEqual(await rate.item())
    }
    // Evaluation counts nothing: the loads are those of the one training pass.
    expect(await total(model.moeLayers[0].load)).toBe(17 * 2)
    // A head without preference: all depths say token 0.
    model.lm_head.weight.assign(tensor(new Float32Array(40 * 24), [40, 24]))
    for (const rate of model.mtpAcceptance(batch).cumulative) expect(await rate.item()).toBe(1)
    model.dispose()
  })

  test('MTP modules with an embedding and a head of their own are trained, counted, saved and used', async () => {
    const config = { ...tiny, mtp_separate_embeddings: true }
    const model = new DeepSeek(config, { seed: 1 })
    const own = namedParameters(model).reduce((sum, { parameter }) => sum + parameter.size, 0)
    const { total, mtp } = countParameters(model.config)
    expect(own).toBe(total + mtp)
    await model.save(join(folder, 'separate'))
    const again = await DeepSeek.fromPretrained(join(folder, 'separate'))
    const ids = async (of: DeepSeek, speculative: boolean) => {
      const made: number[] = []
      for await (const id of of.generate([3, 7, 11], { maxTokens: 20, speculative })) made.push(id)
      return made
    }
    expect(await ids(again, true)).toEqual(await ids(model, false))
    const head = again.mtp[0].ownHead as Tensor
    expect(await head.values()).toEqual(await (model.mtp[0].ownHead as Tensor).values())
    expect(await head.values()).not.toEqual(await again.lm_head.weight.values())
    model.dispose()
    again.dispose()
  })
})

describe('checkpoints', () => {
  test('a folder that cannot be written is reported, wherever it fails', async () => {
    const model = new DeepSeek(tiny, { seed: 7 })
    const file = join(folder, 'file')
    await writeFile(file, '')
    await expect(model.save(file)).rejects.toMatchObject({ code: 'E_CHECKPOINT', op: file })
    const taken = join(folder, 'taken', 'config.json')
    await mkdir(taken, { recursive: true })
    await expect(model.save(join(folder, 'taken'))).rejects.toMatchObject({ code: 'E_CHECKPOINT', op: taken })
    model.dispose()
  })

  test('a saved model opens as the same model, including MTP and balance bias', async () => {
    const model = new DeepSeek(tiny, { seed: 7 })
    const bias = new Random(1).normal(8)
    model.moeLayers[0].gate.e_score_correction_bias?.assign(tensor(bias))
    await model.save(join(folder, 'saved'))
    const again = await DeepSeek.fromPretrained(join(folder, 'saved'))
    expect(again.config).toEqual(model.config)
    for (const [i, { name, parameter }] of namedParameters(model).entries()) {
      const other = namedParameters(again)[i]
      expect(other.name).toBe(name)
      assertClose(name, await other.parameter.values(), await parameter.values(), { relative: 0, absolute: 0 })
    }
    await using file = await readSafetensors(join(folder, 'saved', 'model.safetensors'))
    for (const key of [
      'model.layers.2.embed_tokens.weight',
      'model.layers.2.shared_head.head.weight',
      'model.layers.2.eh_proj.weight',
      'model.layers.1.mlp.experts.7.down_proj.weight',
    ]) {
      expect(file.has(key), key).toBe(true)
    }
    model.dispose()
    again.dispose()
  })

  test('config.json has floats as transformers requires, and empty matrices for missing shared experts', async () => {
    const config = {
      ...tiny,
      n_shared_experts: 0,
      routed_scaling_factor: 1,
      rope_theta: 10000,
      n_group: null,
      topk_group: null,
    }
    const model = new DeepSeek(config)
    const at = join(folder, 'no-shared')
    await model.save(at)
    const text = await readFile(join(at, 'config.json'), 'utf8')
    expect(text).toMatch(/"routed_scaling_factor": 1\.0,/)
    expect(text).toMatch(/"rope_theta": 10000\.0,/)
    expect(JSON.parse(text)).toMatchObject({ n_group: 1, topk_group: 1, vocab_size: 40 })
    await using file = await readSafetensors(join(at, 'model.safetensors'))
    expect(file.info('model.layers.1.mlp.shared_experts.gate_proj.weight').shape).toEqual([0, 24])
    expect(file.info('model.layers.2.mlp.shared_experts.down_proj.weight').shape).toEqual([24, 0])
    const again = await DeepSeek.fromPretrained(at)
    expect(again.config.n_shared_experts).toBe(0)
    model.dispose()
    again.dispose()
  })

  test('a checkpoint of another model is rejected with every key', async () => {
    const model = new DeepSeek(tiny)
    await model.save(join(folder, 'other'))
    await writeFile(
      join(folder, 'other', 'config.json'),
      JSON.stringify({ ...tiny, num_hidden_layers: 3, hidden_size: 28 }),
    )
    await expect(DeepSeek.fromPretrained(join(folder, 'other'))).rejects.toThrow(
      /missing[\s\S]*model\.embed_tokens\.weight: stored \[40,24\], model \[40,28\]/,
    )
    model.dispose()
  })
})

test('a model too large for its checkpoint is rejected before memory is allocated', async () => {
  const model = new DeepSeek(tiny)
  const at = join(folder, 'absurd')
  await model.save(at)
  const { peakBytes } = defaultBackend().stats()
  for (const absurd of [{ vocab_size: 2 ** 40 }, { num_hidden_layers: 2 ** 40 }, { n_routed_experts: 2 ** 20 }]) {
    await writeFile(join(at, 'config.json'), JSON.stringify({ ...tiny, ...absurd }))
    await expect(DeepSeek.fromPretrained(at)).rejects.toThrow(
      expect.objectContaining({ code: 'E_STATE_DICT', message: expect.stringMatching(/describes a model of \d/) }),
    )
  }
  expect(defaultBackend().stats().peakBytes).toBe(peakBytes)
  model.dispose()
})

test('a folder may be a file URL, and config.json begin with a byte order mark', async () => {
  const at = pathToFileURL(join(folder, 'by URL'))
  const model = new DeepSeek(tiny, { seed: 1 })
  await model.save(at)
  const config = new URL(`${at}/config.json`)
  await writeFile(config, `\uFEFF${await readFile(config, 'utf8')}`)
  const again = await DeepSeek.fromPretrained(at)
  await loadWeights(again, at)
  expect(await again.lm_head.weight.values()).toEqual(await model.lm_head.weight.values())
  for (const opened of [model, again]) opened.dispose()
  const none = undefined as unknown as string
  for (const call of [() => DeepSeek.fromPretrained(none), () => model.save(none), () => loadWeights(model, none)])
    await expect(call()).rejects.toMatchObject({
      code: 'E_ATTR',
      message: expect.stringContaining('expected a path, got undefined'),
    })
})

test('a model is opened from a URL, and from File objects', async () => {
  const at = join(folder, 'published')
  const model = new DeepSeek(tiny, { seed: 1 })
  await model.save(at)
  const asked: string[] = []
  const answer = async (address: string) => {
    asked.push(address)
    const body = await readFile(join(at, address.replace('https://example.org/m/', ''))).catch(() => null)
    return new Response(body, { status: body ? 200 : 404 })
  }
  let last = { bytes: 0, totalBytes: 1 }
  const onProgress = (progress: typeof last) => {
    last = progress
  }
  const byAddress = await DeepSeek.fromPretrained('https://example.org/m', {
    fetch: answer,
    onProgress,
    weights: 'bf16',
  })
  expect(last.bytes).toBe(last.totalBytes)
  expect(new Set(asked)).toEqual(
    new Set(['config.json', 'model.safetensors'].map(name => `https://example.org/m/${name}`)),
  )
  const names = ['config.json', 'model.safetensors']
  const files = await Promise.all(names.map(async name => new File([await readFile(join(at, name))], name)))
  const atHand = await DeepSeek.fromPretrained(files)
  expect(await atHand.lm_head.weight.values()).toEqual(await model.lm_head.weight.values())
  await loadWeights(atHand, new URL('https://example.org/m'), { fetch: answer })
  for (const opened of [model, byAddress, atHand]) opened.dispose()
  await expect(DeepSeek.fromPretrained('https://example.org/other', { fetch: answer })).rejects.toThrow(
    'https://example.org/other/config.json: cannot be read: no such file; pass a folder',
  )
  const signal = AbortSignal.abort()
  await expect(DeepSeek.fromPretrained(at, { signal })).rejects.toMatchObject({ code: 'E_ABORTED' })
})

test('a config.json that is no file is refused', async () => {
  const at = join(folder, 'no-file')
  await mkdir(join(at, 'config.json'), { recursive: true })
  await expect(DeepSeek.fromPretrained(at)).rejects.toThrow(
    /config\.json: cannot be read: .*expected a file, got a folder/,
  )
})

describe('configurations', () => {
  test('published parameter counts, to the unit', () => {
    const count = (name: keyof typeof presets) => countParameters(parseConfig(presets[name]))
    expect(count('deepseek-v3')).toMatchObject({
      attention: 187107328,
      moe: 11320164608,
      dense: 396361728,
      total: 671026419200,
      active: 37552297472,
      activeWithoutEmbedding: 36625618432,
    })
    expect(count('deepseek-v2')).toMatchObject({
      attention: 149227520,
      moe: 3822878720,
      dense: 188743680,
      total: 235741434880,
      active: 21375800320,
      activeWithoutEmbedding: 20851512320,
    })
    expect(count('deepseek-v2-lite')).toMatchObject({
      attention: 13763072,
      moe: 571080704,
      dense: 67239936,
      total: 15706484224,
      active: 2661150208,
      activeWithoutEmbedding: 2451435008,
    })
    expect(count('moonlight-16b-a3b')).toMatchObject({
      attention: 13763072,
      moe: 571080768,
      dense: 69206016,
      total: 15960110208,
      active: 2914776192,
      activeWithoutEmbedding: 2579231872,
    })
    expect(count('deepseek-v3').mtp / 1e9).toBeCloseTo(11.61, 1)
  })

  test('cache bytes per token: the published figures, and what the cache of a model takes', () => {
    const cost = (name: keyof typeof presets, dtype: 'bf16' | 'f32' = 'bf16') => {
      const config = parseConfig(presets[name])
      return cacheCost(config, config.num_hidden_layers, dtype)
    }
    expect(cost('deepseek-v3')).toEqual({ elements: 35136, bytes: 70272, expandedBytes: 4997120 })
    expect(cost('deepseek-v2').bytes).toBe(69120)
    expect(cost('deepseek-v2-lite').bytes).toBe(31104)
    expect(cost('moonlight-16b-a3b').bytes).toBe(31104)
    const model = new DeepSeek(tiny)
    const cache = model.makeCache({ capacity: 16 })
    expect(cache.bytesPerToken).toBe(cacheCost(model.config, 2).bytes)
    expect(cache.bytes).toBe(16 * 2 * (8 + 4) * 4)
    cache.dispose()
    const half = model.makeCache({ capacity: 16, dtype: 'bf16' })
    expect(half.bytesPerToken).toBe(cacheCost(model.config, 2, 'bf16').bytes)
    expect(half.bytes).toBe(16 * 2 * (8 + 4) * 2)
    half.dispose()
    model.dispose()
  })

  test('the count is that of the model made', () => {
    for (const config of [
      tiny,
      { ...tiny, q_lora_rank: null, num_nextn_predict_layers: 0, tie_word_embeddings: true },
    ]) {
      const model = new DeepSeek(config)
      const { total, mtp } = countParameters(model.config)
      expect(namedParameters(model).reduce((sum, { parameter }) => sum + parameter.size, 0)).toBe(total + mtp)
      model.dispose()
    }
  })

  test('Kimi K2 is V3 under a name of its own', () => {
    expect(parseConfig({ ...tiny, model_type: 'kimi_k2' })).toEqual(parseConfig(tiny))
  })

  test('scaling without a type is a fault; without the original context, that is max_position_embeddings', () => {
    const scaled = (rope_scaling: object) => parseConfig({ ...tiny, max_position_embeddings: 64, rope_scaling })
    expect(() => scaled({ factor: 4 })).toThrow(/rope_scaling\.type is missing/)
    expect(scaled({ type: 'yarn', factor: 4 }).rope_scaling).toMatchObject({ original_max_position_embeddings: 64 })
  })

  test('all problems are named in one message', () => {
    const broken = { ...tiny, hidden_size: -1, vocab_size: 'many', n_group: 3 }
    expect(() => parseConfig(broken)).toThrow(/2 problems[\s\S]*vocab_size[\s\S]*hidden_size/)
    expect(() => parseConfig({ ...tiny, n_group: 3, qk_rope_head_dim: 3, num_experts_per_tok: 9 })).toThrow(
      /3 problems[\s\S]*odd[\s\S]*exceeds n_routed_experts = 8[\s\S]*n_group = 3 does not divide/,
    )
  })
})
