import {
  addAdapters,
  type Backend,
  MoeError,
  mergeAdapters,
  namedAdapters,
  type Parameter,
  quantizeWeights,
  Random,
  randn,
  setDefaultBackend,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import { type ContinuousBatchOptions, DeepSeek, type GenerationStats, type TurnOptions } from './index.ts'
import { read } from './test-generation.ts'
import { makeDraftsAgree, tiny } from './test-tiny.ts'

const reference = referenceBackend()
const native = await createBackend()
beforeEach(() => setDefaultBackend(reference))
afterAll(() => native.dispose())

/** Prompts of many lengths, some with common prefixes, with all kinds of sampling options. */
function requests(count: number): ReadonlyArray<readonly [ids: number[], options: TurnOptions]> {
  const random = new Random(11)
  const below = (n: number) => Math.floor(random.uniform(1)[0] * n)
  const start = Array.from({ length: 140 }, () => below(40))
  const samplings: TurnOptions[] = [
    {},
    { temperature: 0.9, topP: 0.8 },
    { repetitionPenalty: 1.3 },
    { temperature: 1.2, topK: 5, repetitionPenalty: 1.1 },
    { frequencyPenalty: 0.8, presencePenalty: 0.4 },
    { temperature: 1.1, frequencyPenalty: -0.5, logitBias: { 6: 1, 30: -100 } },
    { temperature: 0.5, minP: 0.1 },
    { stop: [3, 17] },
  ]
  return Array.from({ length: count }, (_, i) => {
    const own = Array.from({ length: i % 4 === 1 ? 1 : 1 + below(20) }, () => below(40))
    const ids = [...start.slice(0, i % 3 === 0 ? 0 : below(140)), ...own]
    const sampling = samplings[i % samplings.length]
    return [ids, { ...sampling, ...(sampling.temperature && { seed: i }), maxTokens: 1 + below(40) }]
  })
}

/** A model whose drafts are sometimes accepted. With depth 0, it has a module but no drafts. */
function draftingModel(depth: number, backend: Backend): DeepSeek {
  const config = { ...tiny, max_position_embeddings: 256, num_nextn_predict_layers: Math.max(1, depth) }
  const model = new DeepSeek(config, { seed: 3, backend })
  makeDraftsAgree(model)
  return model
}

/** The texts for some requests, one after the other, each with its statistics. */
async function generateAlone(depth: number, backend: Backend, all: ReturnType<typeof requests>) {
  const model = draftingModel(depth, backend)
  const alone: Array<{ readonly ids: number[]; readonly stats: GenerationStats }> = []
  for (const [ids, turn] of all) {
    const text = model.generate(ids, { ...turn, speculative: depth > 0 })
    alone.push({ ids: await read(text), stats: text.stats })
  }
  model.dispose()
  return alone
}

const variants: ReadonlyArray<readonly [name: string, options: ContinuousBatchOptions]> = [
  ['all at once', { maxTexts: 32 }],
  ['three at a time, prompts in small pieces', { maxTexts: 3, prefillChunkSize: 7 }],
  ['one at a time', { maxTexts: 1 }],
  ['with a small cache, so that texts are preempted', { maxTexts: 8, cacheTokens: 320 }],
]

describe.each([
  ['the reference backend', () => reference as Backend, 8],
  ['a backend that records', () => native as Backend, 24],
])('texts on %s', (_, of, count) => {
  describe.each([0, 1, 3])('with drafts of %i modules', depth => {
    const all = requests(count)
    let aloneOnce: ReturnType<typeof generateAlone> | undefined
    test.each(variants)('%s: each text is the same as alone', async (_name, options) => {
      const backend = of()
      aloneOnce ??= generateAlone(depth, backend, all)
      const alone = await aloneOnce
      const { handles } = backend.stats()
      const model = draftingModel(depth, backend)
      const batch = model.continuousBatch({ ...options, speculative: depth > 0 })
      // The second half starts while the first is being generated.
      const half = Math.ceil(count / 2)
      const texts = all.slice(0, half).map(([ids, turn]) => batch.generate(ids, turn))
      const first = texts.map(read)
      await first[0]
      texts.push(...all.slice(half).map(([ids, turn]) => batch.generate(ids, turn)))
      const made = await Promise.all([...first, ...texts.slice(half).map(read)])
      expect(made).toEqual(alone.map(({ ids }) => ids))
      for (const [i, { stats }] of texts.entries()) {
        const { ids, stats: ofAlone } = alone[i]
        expect(stats.tokens).toBe(ids.length)
        expect(stats.finishReason).toBe(ids.length === all[i][1].maxTokens ? 'length' : 'stop')
        expect(stats.drafted).toHaveLength(depth)
        expect(stats.drafted).toEqual(ofAlone.drafted)
        expect(stats.accepted).toEqual(ofAlone.accepted)
      }
      for (let k = 0; k < depth; k++) {
        const count = (of: 'drafted' | 'accepted') => texts.reduce((sum, { stats }) => sum + stats[of][k], 0)
        expect(count('accepted')).toBeGreaterThan(0)
        expect(count('drafted')).toBeGreaterThan(count('accepted'))
      }
      expect(batch.running + batch.waiting).toBe(0)
      batch.dispose()
      model.dispose()
      expect(backend.stats().handles).toBe(handles)
    })
  })
})

test('texts of dense models, whose caches contain keys and values, are the same as alone', async () => {
  const { num_nextn_predict_layers: _, ...rest } = tiny
  const dense = { ...rest, model_type: 'llama', num_key_value_heads: 1, head_dim: 12, max_position_embeddings: 256 }
  const model = new DeepSeek(dense as never, { seed: 3, backend: native })
  const batch = model.continuousBatch({ maxTexts: 4, prefillChunkSize: 9, cacheDtype: 'bf16' })
  const all = requests(8)
  const made = await Promise.all(all.map(([ids, turn]) => read(batch.generate(ids, turn))))
  for (const [i, [ids, turn]] of all.entries()) {
    expect(made[i]).toEqual(await read(model.generate(ids, { ...turn, cacheDtype: 'bf16' })))
  }
  batch.dispose()
  model.dispose()
})

test('a preempted sampled text continues as if it had not been preempted', async () => {
  const model = new DeepSeek({ ...tiny, max_position_embeddings: 256 }, { seed: 3, backend: native })
  makeDraftsAgree(model)
  const batch = model.continuousBatch({ cacheTokens: 256, speculative: true })
  for (let seed = 0; seed < 16; seed++) {
    // Both need three pages of 64, but the cache has four.
    const prompts = [1, 2].map(id => [id, ...Array.from({ length: 40 + seed }, (_, i) => (i * 11 + seed) % 40)])
    const turn = { maxTokens: 100, temperature: 0.8, seed }
    const alone = (ids: number[]) => read(model.generate(ids, { ...turn, speculative: true }))
    const made = await Promise.all(prompts.map(ids => read(batch.generate(ids, turn))))
    for (const [i, ids] of prompts.entries()) expect(made[i]).toEqual(await alone(ids))
  }
  batch.dispose()
  model.dispose()
})

test('an end token or maxTokens among accepted drafts ends the text', async () => {
  const config = { ...tiny, max_position_embeddings: 256, num_nextn_predict_layers: 3 }
  const model = new DeepSeek(config, { seed: 3, backend: native })
  makeDraftsAgree(model)
  const batch = model.continuousBatch({ speculative: true })
  const whole = batch.generate([5, 6, 7], { maxTokens: 60 })
  const ids = await read(whole)
  expect(whole.stats.accepted[1]).toBeGreaterThan(0)
  for (let end = 1; end < 60; end++) {
    const stop = ids[end]
    const until = ids.indexOf(stop)
    const stopped = batch.generate([5, 6, 7], { maxTokens: 60, stop: [stop] })
    const cut = batch.generate([5, 6, 7], { maxTokens: end })
    expect(await Promise.all([read(stopped), read(cut)])).toEqual([ids.slice(0, until), ids.slice(0, end)])
    expect([stopped.stats.finishReason, cut.stats.finishReason]).toEqual(['stop', 'length'])
  }
  batch.dispose()
  model.dispose()
})

test.each([false, true])('common prefixes are processed once, until weights change (drafts: %s)', async speculative => {
  const model = new DeepSeek({ ...tiny, max_position_embeddings: 512 }, { seed: 3, backend: reference })
  const batch = model.continuousBatch({ speculative })
  const prompt = Array.from({ length: 150 }, (_, i) => (i * 7) % 40)
  const turn = async (ids: number[]) => {
    const text = batch.generate(ids, { maxTokens: 50 })
    return { answer: await read(text), reused: text.stats.cachedTokens }
  }
  const first = await turn(prompt)
  expect(first.reused).toBe(0)
  // Complete pages of 64 are reused, but the last token is always processed.
  expect((await turn(prompt)).reused).toBe(128)
  expect((await turn(prompt.slice(0, 128))).reused).toBe(64)
  expect((await turn([...prompt, ...first.answer, 5])).reused).toBe(192)
  expect((await turn([1, ...prompt])).reused).toBe(0)
  const { weight } = model.lm_head
  ;(weight as Parameter).assign(weight.detach().mul(-1))
  const changed = await turn(prompt)
  expect(changed.reused).toBe(0)
  expect(changed.answer).toEqual(await read(model.generate(prompt, { maxTokens: 50 })))
  batch.dispose()
  model.dispose()
})

test.each([
  ['the reference backend', reference as Backend],
  ['a backend that records', native as Backend],
])(
  'texts follow adapters that are added, trained and merged, and weights that are quantized: %s',
  async (_, backend) => {
    const model = new DeepSeek({ ...tiny, max_position_embeddings: 512 }, { seed: 3, backend })
    const batch = model.continuousBatch()
    const prompt = Array.from({ length: 150 }, (_, i) => (i * 7) % 40)
    const turn = { maxTokens: 12 }
    const expectSameAsAlone = async () => {
      const text = batch.generate(prompt, turn)
      expect(await read(text)).toEqual(await read(model.generate(prompt, { ...turn, precision: 'f32' })))
      expect(text.stats.cachedTokens).toBe(0)
    }
    const train = (seed: number) => {
      for (const { adapter } of namedAdapters(model)) {
        adapter.up.assign(randn(adapter.up.shape, new Random(seed), { std: 0.5, backend }))
      }
    }
    await expectSameAsAlone()
    addAdapters(model, { rank: 2 })
    await expectSameAsAlone()
    train(1)
    await expectSameAsAlone()
    await quantizeWeights(model, 'int8')
    await expectSameAsAlone()
    train(2)
    await expectSameAsAlone()
    await mergeAdapters(model)
    await expectSameAsAlone()
    batch.dispose()
    model.dispose()
  },
)

test('recordings are discarded when the cache moves to larger memory', async () => {
  const model = new DeepSeek({ ...tiny, max_position_embeddings: 512 }, { seed: 3, backend: native })
  const batch = model.continuousBatch({ maxTexts: 12 })
  const alone = () => read(batch.generate([5, 6, 7], { maxTokens: 30 }))
  const expected = await alone()
  const many = Array.from({ length: 12 }, (_, i) => Array.from({ length: 200 }, (_, t) => (t * (i + 3)) % 40))
  await Promise.all(many.map(ids => read(batch.generate(ids, { maxTokens: 2 }))))
  expect(await alone()).toEqual(expected)
  batch.dispose()
  model.dispose()
})

test.each([0, 1, 3])('abandoned and aborted texts do not affect others: %i modules', async depth => {
  const { handles } = native.stats()
  const config = { ...tiny, max_position_embeddings: 256, num_nextn_predict_layers: depth }
  const model = new DeepSeek(config, { seed: 3, backend: native })
  const batch = model.continuousBatch({ maxTexts: 3, speculative: depth > 0 })
  const expected = await read(model.generate([5, 6, 7], { maxTokens: 60 }))
  const stays = read(batch.generate([5, 6, 7], { maxTokens: 60 }))
  const abort = new AbortController()
  const endless = batch.generate([8, 9], { maxTokens: 1000, signal: abort.signal, onToken: () => abort.abort() })
  const aborted = expect(read(endless)).rejects.toMatchObject({ code: 'E_ABORTED' })
  const forgotten = batch.generate([1, 2], { maxTokens: 30 })[Symbol.asyncIterator]()
  await forgotten.next()
  for await (const _ of batch.generate([3], { maxTokens: 1000 })) break
  await aborted
  await expect(read(batch.generate([3], { signal: AbortSignal.abort() }))).rejects.toMatchObject({ code: 'E_ABORTED' })
  expect(await stays).toEqual(expected)
  batch.dispose()
  model.dispose()
  expect(native.stats().handles).toBe(handles)
})

test('an aborted text leaves the batch at once, running or waiting, even if nobody reads it', async () => {
  const { handles } = native.stats()
  const model = new DeepSeek({ ...tiny, max_position_embeddings: 4096 }, { seed: 3, backend: native })
  const batch = model.continuousBatch({ maxTexts: 2, speculative: true })
  const aborts = [1, 2, 3].map(() => new AbortController())
  const texts = aborts.map(({ signal }, i) => batch.generate([i], { maxTokens: 4000, signal })[Symbol.asyncIterator]())
  await Promise.all([texts[0].next(), texts[1].next()])
  const third = texts[2].next()
  expect([batch.running, batch.waiting]).toEqual([2, 1])
  aborts[2].abort()
  expect([batch.running, batch.waiting]).toEqual([2, 0])
  aborts[0].abort()
  expect([batch.running, batch.waiting]).toEqual([1, 0])
  await Promise.all([third, texts[0].next()].map(next => expect(next).rejects.toMatchObject({ code: 'E_ABORTED' })))
  expect(await texts[1].next()).toMatchObject({ done: false })
  // Nobody reads the second text any more.
  batch.dispose()
  expect([batch.running, batch.waiting]).toEqual([0, 0])
  await new Promise(setImmediate)
  await new Promise(setImmediate)
  model.dispose()
  expect(native.stats().handles).toBe(handles)
})

test.each([0, 1, 3])('disposing the batch ends its texts, with drafts of %i modules', async depth => {
  const { handles } = native.stats()
  const config = { ...tiny, max_position_embeddings: 4096, num_nextn_predict_layers: depth }
  const model = new DeepSeek(config, { seed: 3, backend: native })
  const batch = model.continuousBatch({ maxTexts: 1, speculative: depth > 0 })
  const texts = [read(batch.generate([1, 2], { maxTokens: 1000 })), read(batch.generate([1], { maxTokens: 1000 }))]
  const ends = texts.map(text => expect(text).rejects.toMatchObject({ code: 'E_DISPOSED' }))
  await new Promise(resolve => setTimeout(resolve, 20))
  batch.dispose()
  batch.dispose()
  await Promise.all(ends)
  expect(() => batch.generate([1])).toThrow(expect.objectContaining({ code: 'E_DISPOSED' }))
  await new Promise(setImmediate)
  await new Promise(setImmediate)
  model.dispose()
  expect(native.stats().handles).toBe(handles)
})

test.each(['model', 'module'])('a failing pass of the %s fails its texts, but not later ones', async part => {
  const { handles } = reference.stats()
  const config = { ...tiny, max_position_embeddings: 256, num_nextn_predict_layers: 2 }
  const model = new DeepSeek(config, { seed: 3, backend: reference })
  const batch = model.continuousBatch({ speculative: true })
  const { hidden } = model
  const [, module] = model.mtp
  const { forward } = module
  let passes = 0
  const fails = () => {
    if (++passes > 3) throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: 'test', problem: 'no memory' })
  }
  if (part === 'model') {
    model.hidden = (...args) => {
      fails()
      return hidden.apply(model, args)
    }
  } else {
    module.forward = (...args) => {
      fails()
      return forward.apply(module, args)
    }
  }
  const texts = [read(batch.generate([1, 2])), read(batch.generate([3])), read(batch.generate([4, 5]))]
  for (const text of texts) await expect(text).rejects.toMatchObject({ code: 'E_OUT_OF_MEMORY' })
  model.hidden = hidden
  module.forward = forward
  expect(await read(batch.generate([1, 2], { maxTokens: 5 }))).toHaveLength(5)
  batch.dispose()
  model.dispose()
  expect(reference.stats().handles).toBe(handles)
})

test('invalid arguments are rejected', async () => {
  const model = new DeepSeek({ ...tiny, max_position_embeddings: 256 }, { seed: 3, backend: reference })
  expect(() => model.continuousBatch({ maxTexts: 0 })).toThrow('maxTexts = 0, expected a positive integer')
  expect(() => model.continuousBatch({ maxText: 2 } as never)).toThrow('did you mean maxTexts?')
  const batch = model.continuousBatch({ cacheTokens: 64 })
  expect(() => batch.generate(new Array(65).fill(1))).toThrow(
    'the prompt has 65 tokens, but the cache has room for only 64',
  )
  expect(() => batch.generate([])).toThrow('the prompt is empty')
  batch.dispose()
  // By default, there is room for the whole context, and for 2048 tokens per text.
  const long = new DeepSeek({ ...tiny, max_position_embeddings: 4096 }, { seed: null, backend: reference })
  const one = long.continuousBatch({ maxTexts: 1 })
  one.generate(new Array(4095).fill(1))
  one.dispose()
  long.dispose()
  model.dispose()
})

test.each([0, 1, 3])('a text ends when it fills the cache: %i modules', async depth => {
  const config = { ...tiny, max_position_embeddings: 256, num_nextn_predict_layers: depth }
  const model = new DeepSeek(config, { seed: 3, backend: reference })
  const batch = model.continuousBatch({ cacheTokens: 64, speculative: depth > 0 })
  const text = batch.generate([1, 2], { maxTokens: 100 })
  // 64 tokens are processed, and one more is generated after them.
  expect(await read(text)).toEqual(await read(model.generate([1, 2], { maxTokens: 63 })))
  expect(text.stats.finishReason).toBe('length')
  batch.dispose()
  model.dispose()
})

test('if memory runs out, texts wait, and a text that does not fit alone fails', async () => {
  const whole = referenceBackend()
  let full = true
  const concat: typeof whole.primitives.concat = (...args) => {
    const isCache = args[0].every(({ shape }) => shape.length === 3 && shape[1] === 64 && shape[2] === 12)
    if (full && isCache) throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: 'concat', problem: 'no memory' })
    return whole.primitives.concat(...args)
  }
  const backend = { ...whole, primitives: { ...whole.primitives, concat } }
  const model = new DeepSeek({ ...tiny, max_position_embeddings: 4096 }, { seed: 3, backend })
  // The cache starts with 16 pages of 64 tokens.
  const batch = model.continuousBatch()
  const prompts = [1, 2, 3].map(first => [first, ...Array.from({ length: 480 }, (_, i) => (i * first) % 40)])
  const made = await Promise.all(prompts.map(ids => read(batch.generate(ids, { maxTokens: 4 }))))
  const large = new Array(1100).fill(7)
  expect(() => batch.generate(large)).toThrow('the prompt has 1100 tokens, but the cache has room for only 1024')
  const other = model.continuousBatch({ prefillChunkSize: 2048 })
  await expect(read(other.generate(large))).rejects.toThrow('there is memory for 1024 tokens, but the text has 1100')
  other.dispose()
  full = false
  for (const [i, ids] of prompts.entries()) {
    expect(made[i]).toEqual(await read(model.generate(ids, { maxTokens: 4 })))
  }
  batch.dispose()
  model.dispose()
})
