/** @file Inference on one rank with the experts of several, compared with the whole model on one rank. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { deferWeights, full, Module, namedParameters, scope, setDefaultBackend, stateDict } from '@moe/core'
import { DeepSeek, type DeepSeekConfigInput, type DeepSeekOptions, type Generation } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { AdamW } from '@moe/trainer'
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest'
import { local, localOver } from '../communicator/local.ts'
import { DelayedTransport } from '../communicator/test-delays.ts'
import type { Transport } from '../communicator/transport.ts'
import { batchesOf, newModel } from '../test-steps.ts'
import { ExpertParallel } from './expert-parallel.ts'

const backend = await createBackend()
afterAll(() => backend.dispose())
beforeEach(() => setDefaultBackend(backend))
afterEach(() => expect(backend.stats().handles).toBe(0))

const prompts = [
  [3, 7, 11, 2, 10, 8, 1],
  [4, 9],
  [3, 7, 11, 2, 10, 8, 1, 19, 0, 1, 2, 6, 17],
]

async function read(text: Generation<number>): Promise<number[]> {
  const ids: number[] = []
  for await (const id of text) ids.push(id)
  return ids
}

/** What inference gives, in all of its forms. */
async function inferences(model: DeepSeek) {
  const drafted = model.generate(prompts[0], { maxTokens: 12, speculative: true })
  const greedy = await read(drafted)
  const sampled = await read(model.generate(prompts[0], { maxTokens: 12, temperature: 1, seed: 3 }))
  const session = model.session({ speculative: true })
  const turns: number[][] = []
  for (const prompt of [prompts[1], prompts[2], prompts[0]])
    turns.push(await read(session.generate(prompt, { maxTokens: 6 })))
  session.dispose()
  const batch = model.continuousBatch({ speculative: true, prefillChunkSize: 5 })
  const together = await Promise.all(prompts.map(prompt => read(batch.generate(prompt, { maxTokens: 9 }))))
  batch.dispose()
  const scores = (await model.score(prompts)).map(text => text.map(each => each?.logProb ?? 0))
  return { texts: { greedy, accepted: drafted.stats.accepted, sampled, turns, together }, scores }
}

/** Inference of the whole model on one rank. */
async function whole(changes: Partial<DeepSeekConfigInput>, options: DeepSeekOptions) {
  const model = newModel(changes, options)
  const result = await inferences(model)
  model.dispose()
  return result
}

const close = (scores: number[][]) => scores.map(text => text.map(score => expect.closeTo(score, 4)))

describe('texts, drafts and log-probabilities are those of the whole model', () => {
  test.each<[string, number, Partial<DeepSeekConfigInput>, DeepSeekOptions, number?]>([
    ['one rank', 1, {}, {}],
    ['two ranks', 2, {}, {}],
    ['one rank per expert', 4, {}, {}],
    ['two leaders', 4, {}, {}, 2],
    ['without shared experts', 2, { n_shared_experts: 0 }, {}],
    [
      'sparse attention with shared indexers',
      2,
      {
        ...{ model_type: 'glm_moe_dsa', index_n_heads: 2, index_head_dim: 4, index_topk: 4 },
        indexer_types: Array.from({ length: 8 }, (_, i) => (i % 3 === 0 ? ('full' as const) : ('shared' as const))),
      },
      {},
    ],
    ['weights in bf16', 2, {}, { weights: 'bf16' }],
    ['weights in fp8', 2, {}, { weights: 'fp8' }],
    ['weights in int8', 2, {}, { weights: 'int8' }],
    ['weights in int4', 4, {}, { weights: 'int4' }],
  ])('%s', async (_, size, changes, options, expertParallelSize = size) => {
    const expected = await whole(changes, options)
    const found = await local(size, async ranks => {
      const model = deferWeights(() => newModel(changes, options))
      const parallel = new ExpertParallel(model, ranks, { expertParallelSize })
      const result = await parallel.lead(() => inferences(model))
      parallel.dispose()
      model.dispose()
      return result
    })
    for (const [rank, result] of found.entries())
      expect(result).toEqual(
        rank % expertParallelSize === 0 ? { ...expected, scores: close(expected.scores) } : undefined,
      )
  })
})

test('the other ranks have memory only for their experts, and gather() restores the model, also with quantized weights', async () => {
  for (const weights of [undefined, 'fp8', 'int4'] as const) {
    const expected = newModel({}, { weights })
    const bytes = await local(2, async ranks => {
      const own = await createBackend()
      const model = deferWeights(() => newModel({}, { backend: own, weights }))
      const before = own.stats().bytes
      const parallel = new ExpertParallel(model, ranks)
      await parallel.lead(() => read(model.generate([1, 2], { maxTokens: 2 })))
      const held = own.stats().bytes - before
      const experts = parallel.weights.filter(({ firstRow }) => firstRow !== undefined)
      await parallel.gather()
      for (const [i, { name, data }] of stateDict(model).entries())
        expect([name, await data()]).toEqual([name, await stateDict(expected)[i].data()])
      const restored = namedParameters(model).find(({ slices }) => slices)?.parameter.size ?? 0
      parallel.dispose()
      model.dispose()
      own.dispose()
      return { held, experts: experts.reduce((sum, { parameter }) => sum + parameter.size, 0), restored }
    })
    expect(bytes[1].held).toBeLessThan(bytes[0].held / 2)
    // Codes of a weight, two to a byte in int4, and scales.
    expect(bytes[1].held).toBeLessThan(bytes[1].experts * { none: 4.1, fp8: 6, int4: 6 }[weights ?? 'none'])
    expected.dispose()
  }
})

test('a checkpoint opens on ranks, each with the weights that it needs', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'moe-lead-'))
  const model = newModel()
  await model.save(folder)
  model.dispose()
  const prompt = [3, 7, 11, 2]
  for (const weights of [undefined, 'int4'] as const) {
    const whole = await DeepSeek.fromPretrained(folder, { weights })
    const expected = await read(whole.generate(prompt, { maxTokens: 8 }))
    whole.dispose()
    const [first, second] = await local(2, async ranks => {
      const own = await createBackend()
      const { model: opened, spread: parallel } = await ExpertParallel.open(
        parameters => DeepSeek.fromPretrained(folder, { weights, backend: own, parameters }),
        ranks,
      )
      const text = await parallel.lead(() => read(opened.generate(prompt, { maxTokens: 8 })))
      const { bytes } = own.stats()
      // What was not loaded must not become the zeros that a checkpoint replaces.
      await parallel.synchronize()
      const embedding = opened.model.embed_tokens.weight
      const result = { text, bytes, embedded: embedding.handle !== null }
      parallel.dispose()
      opened.dispose()
      own.dispose()
      return result
    })
    expect([first.text, second.text]).toEqual([expected, undefined])
    expect(second.bytes).toBeLessThan(first.bytes)
    expect([first.embedded, second.embedded]).toEqual([true, false])
  }
  const adapters = await mkdtemp(join(folder, 'adapters-'))
  const description = {
    peft_type: 'LORA',
    base_model_name_or_path: folder,
    r: 2,
    lora_alpha: 2,
    target_modules: ['q_proj'],
  }
  await writeFile(join(adapters, 'adapter_config.json'), JSON.stringify(description))
  await local(1, async ranks => {
    const whole = newModel()
    const opening = ExpertParallel.open(async () => whole, ranks)
    await expect(opening).rejects.toThrow('the function has not called `parameters`; pass it to fromPretrained')
    whole.dispose()
  })
  const part = DeepSeek.fromPretrained(adapters, { parameters: () => [] })
  await expect(part).rejects.toThrow(/contains adapters, which can only be added to a whole model; open it without/)
  await rm(folder, { recursive: true })
})

test('weights after training steps are used, and training goes on as without inference in between', async () => {
  const run = (between: boolean) =>
    local(2, async ranks => {
      const model = newModel()
      const parallel = new ExpertParallel(model, ranks)
      parallel.shardOptimizer()
      const optimizer = new AdamW(parallel.parameters)
      const texts: unknown[] = []
      const losses: number[] = []
      for (let step = 0; step < 3; step++) {
        losses.push((await parallel.step([batchesOf(2, model)[ranks.rank]])).loss)
        scope(() => optimizer.step(1e-2, full([], 1)))
        if (between) texts.push(await parallel.lead(() => read(model.generate([1, 2, 3], { maxTokens: 8 }))))
      }
      await parallel.gather()
      const last = await read(model.generate([1, 2, 3], { maxTokens: 8 }))
      optimizer.dispose()
      parallel.dispose()
      model.dispose()
      return { losses, texts, last }
    })
  const [plain] = await run(false)
  const [led, other] = await run(true)
  expect(led.losses).toEqual(plain.losses)
  expect(led.texts.at(-1)).toEqual(plain.last)
  expect(other.texts).toEqual([undefined, undefined, undefined])
})

test('a batch that is kept between training steps does not reuse what other weights of experts have computed', async () => {
  const prompt = Array.from({ length: 100 }, (_, i) => 2 + ((i * i) % 17))
  await local(2, async ranks => {
    const model = newModel()
    for (const { name, parameter } of namedParameters(model)) parameter.trainable = name.includes('.experts.')
    const parallel = new ExpertParallel(model, ranks)
    const optimizer = new AdamW(parallel.parameters)
    let kept: ReturnType<DeepSeek['continuousBatch']> | undefined
    const scoresOf = async (batch: ReturnType<DeepSeek['continuousBatch']>) => {
      const text = batch.generate(prompt, { maxTokens: 3, logProbs: 0 })
      await read(text)
      return text.logProbs.map(({ logProb }) => logProb)
    }
    const before = await parallel.lead(() => {
      kept = model.continuousBatch()
      return scoresOf(kept)
    })
    await parallel.step([batchesOf(2, model)[ranks.rank]])
    scope(() => optimizer.step(1e-1, full([], 1)))
    const after = await parallel.lead(async () => {
      const fresh = model.continuousBatch()
      const scores = [await scoresOf(kept as typeof fresh), await scoresOf(fresh)]
      for (const batch of [kept, fresh]) batch?.dispose()
      return scores
    })
    if (ranks.rank === 0) {
      expect(after?.[1]).not.toEqual(before)
      expect(after?.[0]).toEqual(after?.[1])
    }
    optimizer.dispose()
    parallel.dispose()
    model.dispose()
  })
})

test('passes of several texts at a time, one of which is aborted, do not disturb each other', async () => {
  const model = newModel()
  const alone: number[][] = []
  for (const prompt of prompts) alone.push(await read(model.generate(prompt, { maxTokens: 5 })))
  model.dispose()
  // The pass of a text goes on while another waits for a message.
  const delayed = (transport: Transport) => new DelayedTransport(transport, () => 0.1)
  await localOver(2, delayed, async ranks => {
    const model = newModel()
    const parallel = new ExpertParallel(model, ranks)
    await parallel.lead(async () => {
      const controller = new AbortController()
      const options = { maxTokens: 12, signal: controller.signal, onToken: () => controller.abort() }
      const aborted = read(model.generate([8, 9], options)).catch(error => error.code)
      const texts = await Promise.all(prompts.map(prompt => read(model.generate(prompt, { maxTokens: 5 }))))
      expect([texts, await aborted]).toEqual([alone, 'E_ABORTED'])
    })
    parallel.dispose()
    model.dispose()
  })
})

test('an error of the function ends the other ranks, and the model can lead again', async () => {
  await local(2, async ranks => {
    const model = newModel()
    const parallel = new ExpertParallel(model, ranks)
    const failed = parallel.lead(async () => {
      await read(model.generate([1], { maxTokens: 2 }))
      throw new Error('no disk')
    })
    if (ranks.rank === 0) await expect(failed).rejects.toThrow('no disk')
    else expect(await failed).toBe(undefined)
    const [texts] = [await parallel.lead(() => read(model.generate([1], { maxTokens: 2 })))]
    expect(texts?.length).toBe(ranks.rank === 0 ? 2 : undefined)
    parallel.dispose()
    model.dispose()
  })
})

test('what all ranks do together is an error within lead(), which goes on', async () => {
  await local(2, async ranks => {
    const model = newModel()
    const parallel = new ExpertParallel(model, ranks)
    const together = [() => parallel.lead(async () => 1), () => parallel.gather(), () => parallel.step([])]
    const texts = await parallel.lead(async () => {
      for (const call of together) await expect(call()).rejects.toThrow(/compute experts for lead\(\)/)
      return read(model.generate([1], { maxTokens: 2 }))
    })
    expect(texts?.length).toBe(ranks.rank === 0 ? 2 : undefined)
    await parallel.gather()
    parallel.dispose()
    model.dispose()
  })
})

test('if an exchange fails, lead() fails, whatever its function does; an earlier failure of a pass is only that of its text', async () => {
  const log: string[] = []
  const failed = local(2, async ranks => {
    const model = newModel()
    const parallel = new ExpertParallel(model, ranks)
    const led = parallel.lead(async () => {
      const { forward } = model.moeLayers[1].gate
      model.moeLayers[1].gate.forward = () => {
        throw new Error('before the exchange')
      }
      await read(model.generate([1], { maxTokens: 2 })).catch(error => log.push(error.message))
      model.moeLayers[1].gate.forward = forward
      log.push(`${(await read(model.generate([1], { maxTokens: 2 }))).length} tokens`)
      ranks.allToAll = () => Promise.reject(new Error('no network'))
      await read(model.generate([1], { maxTokens: 2 })).catch(error => log.push(error.message))
      // A server goes on.
      await new Promise(() => undefined)
    })
    await led.finally(() => {
      parallel.dispose()
      model.dispose()
    })
  })
  await expect(failed).rejects.toThrow('no network')
  expect(log).toEqual(['before the exchange', '2 tokens', 'no network'])
})

test('inference that outlives the function, and a model without remote experts, are errors', async () => {
  await local(2, async ranks => {
    const model = newModel()
    const parallel = new ExpertParallel(model, ranks)
    let late: Promise<unknown> | undefined
    await parallel.lead(async () => {
      const session = model.session()
      late = read(session.generate([1], { maxTokens: 40 })).finally(() => session.dispose())
      await new Promise(setImmediate)
    })
    if (ranks.rank === 0) await expect(late).rejects.toThrow(/freed|lead: the other ranks no longer compute experts/)
    parallel.dispose()
    const other = newModel()
    class Plain extends Module {
      part = other
      moeLayers = other.moeLayers
      inPieces = other.inPieces.bind(other)
    }
    const unable = new ExpertParallel(new Plain(), ranks)
    await expect(unable.lead(async () => 0)).rejects.toThrow(
      'ExpertParallel.lead: the model has no property remoteExperts; pass a DeepSeek',
    )
    unable.dispose()
    for (const each of [model, other]) each.dispose()
  })
})

test('an evaluation on ranks frees the results of each layer', async () => {
  const peakOf = (layers: number) =>
    local(2, async ranks => {
      const own = await createBackend()
      const changes = { num_hidden_layers: layers, num_nextn_predict_layers: 0 }
      const model = deferWeights(() => newModel(changes, { backend: own }))
      const parallel = new ExpertParallel(model, ranks)
      await parallel.synchronize()
      const rows = { tokens: new Int32Array(4 * 101).fill(3), documents: new Int32Array(4 * 101), rows: 4, length: 101 }
      const before = own.stats().bytes
      await parallel.evaluate([{ batch: rows, from: 0 }])
      const peak = own.stats().peakBytes - before
      parallel.dispose()
      model.dispose()
      own.dispose()
      return peak
    })
  const [few] = await peakOf(4)
  const [many] = await peakOf(12)
  expect(many).toBeLessThan(1.1 * few)
})
