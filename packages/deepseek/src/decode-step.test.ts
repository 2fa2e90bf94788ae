/** @file Recorded decoding compared with decoding op by op, on a backend that can record. */
import {
  adamwStep,
  type Backend,
  createModule,
  full,
  type Graph,
  isMoeError,
  MoeError,
  namedParameters,
  Random,
  randn,
  scope,
  type Tensor,
  tensor,
} from '@moe/core'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, describe, expect, test } from 'vitest'
import { DeepSeek, type DeepSeekOptions, type GenerateOptions } from './index.ts'
import { tiny } from './test-tiny.ts'

const native = await createBackend()
afterAll(() => native.dispose())

/** A backend that counts captures and replays, and one that cannot record. */
function pair() {
  const counts = { captures: 0, replays: 0 }
  const recording: Backend = {
    ...native,
    capture(fn, options) {
      counts.captures++
      const graph = native.capture(fn, options)
      const counted: Graph<ReturnType<typeof fn>> = {
        ...graph,
        replay(updates) {
          counts.replays++
          graph.replay(updates)
        },
      }
      return counted
    },
  }
  const eager: Backend = { ...native, capture: undefined, write: undefined }
  return { counts, recording, eager }
}

const prompt = [3, 7, 11, 2, 30]

async function generated(model: DeepSeek, options: GenerateOptions, onToken?: (n: number) => void): Promise<number[]> {
  const ids: number[] = []
  for await (const id of model.generate(prompt, options)) {
    ids.push(id)
    onToken?.(ids.length)
  }
  return ids
}

/** The same model on both backends. */
function models(config: object, options: DeepSeekOptions = {}) {
  const { counts, recording, eager } = pair()
  const make = (backend: Backend) => new DeepSeek({ ...tiny, ...config }, { seed: 1, ...options, backend })
  return { counts, recorded: make(recording), plain: make(eager) }
}

describe('recorded decoding', () => {
  test('produces the same tokens as op by op, also when the cache grows, and leaks nothing', async () => {
    const { handles } = native.stats()
    const { counts, recorded, plain } = models({})
    // The cache starts with 64 positions, grows once, and the graph is recorded again.
    const options = { maxTokens: 90 }
    expect(await generated(recorded, options)).toEqual(await generated(plain, options))
    expect(counts.captures).toBeGreaterThan(0)
    expect(counts.replays).toBeGreaterThan(80)
    recorded.dispose()
    plain.dispose()
    expect(native.stats().handles).toBe(handles)
  })

  test.each(['bf16', 'fp8', 'int8', 'int4'] as const)('produces the same tokens with weights in %s', async weights => {
    const { counts, recorded, plain } = models({ hidden_size: 32 }, { weights })
    const options = { maxTokens: 20 }
    expect(await generated(recorded, options)).toEqual(await generated(plain, options))
    expect(counts.replays).toBe(18)
    recorded.dispose()
    plain.dispose()
  })

  test('produces the same tokens with drafts, sampled or greedy', async () => {
    const { counts, recorded, plain } = models({ num_nextn_predict_layers: 2 })
    for (const sampling of [
      {},
      { temperature: 0.8, seed: 4 },
      { temperature: 0.8, topK: 3, topP: 0.9, seed: 4 },
      { repetitionPenalty: 1.2 },
      { frequencyPenalty: 0.7, presencePenalty: 0.3 },
      { temperature: 0.8, topK: 3, repetitionPenalty: 1.2, seed: 4 },
    ]) {
      const options = { maxTokens: 60, speculative: true, ...sampling }
      const { replays } = counts
      const text = recorded.generate(prompt, options)
      const ids: number[] = []
      for await (const id of text) ids.push(id)
      expect(ids).toEqual(await generated(plain, options))
      // The main model and both modules replay all passes except the prompt and the first two of each length.
      const passes = 3 * text.stats.steps
      expect(counts.replays - replays).toBeGreaterThan(passes - 3 * 6)
    }
    recorded.dispose()
    plain.dispose()
  })

  test('continues op by op if there is no memory for a graph', async () => {
    const { handles } = native.stats()
    const { recording, eager } = pair()
    let failed = 0
    const full: Backend = {
      ...recording,
      capture(fn) {
        return native.capture(() => {
          for (const result of Object.values(fn() as Record<string, Tensor>)) result.dispose()
          failed++
          throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: 'matmul', problem: 'no memory' })
        })
      },
    }
    const [short, plain] = [full, eager].map(
      backend => new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { seed: 1, backend }),
    )
    const options = { maxTokens: 40, speculative: true }
    expect(await generated(short, options)).toEqual(await generated(plain, options))
    // Recording is tried once for each cache.
    expect(failed).toBe(3)
    short.dispose()
    plain.dispose()
    expect(native.stats().handles).toBe(handles)
  })

  test('leaks nothing after an out-of-memory error, at several limits', async () => {
    const config = { ...tiny, num_nextn_predict_layers: 2 }
    const options = { maxTokens: 80, speculative: true, cacheDtype: 'bf16' } as const
    const runWithLimit = async (memoryLimit?: number) => {
      const backend = await createBackend({ memoryLimit })
      const model = new DeepSeek(config, { seed: 1, backend })
      const { bytes: weights } = backend.stats()
      const ids = await generated(model, options).catch(error => error as Error)
      model.dispose()
      const { handles, bytes, peakBytes } = backend.stats()
      backend.dispose()
      expect({ handles, bytes }).toEqual({ handles: 0, bytes: 0 })
      return { ids, weights, peakBytes }
    }
    const { ids, weights, peakBytes } = await runWithLimit()
    for (const share of [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]) {
      const short = await runWithLimit(weights + Math.floor(share * (peakBytes - weights)))
      if (Array.isArray(short.ids)) expect(short.ids).toEqual(ids)
      else expect(short.ids).toMatchObject({ code: 'E_OUT_OF_MEMORY' })
    }
  })

  test.each([1, 2, 3, 9, 10, 11, 40, 41, 42])('leaks nothing if read %i from the device fails', async fails => {
    const { recording } = pair()
    let reads = 0
    const losing: Backend = {
      ...recording,
      async download(value) {
        if (++reads === fails) throw new MoeError({ code: 'E_BACKEND', op: 'download', problem: 'the device is lost' })
        return native.download(value)
      },
    }
    const { handles } = native.stats()
    const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { seed: 1, backend: losing })
    await expect(generated(model, { maxTokens: 60, speculative: true })).rejects.toThrow(/the device is lost/)
    model.dispose()
    expect(native.stats().handles).toBe(handles)
  })

  test('ends a text if the model is disposed, without replays over freed memory', async () => {
    for (const after of [1, 2, 3, 9, 20]) {
      const { recording } = pair()
      const { handles } = native.stats()
      const depth = after % 2
      const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: depth }, { seed: 1, backend: recording })
      const options = { maxTokens: 60, speculative: depth > 0 }
      const text = generated(model, options, n => n === after && model.dispose())
      await expect(text).rejects.toMatchObject({ code: 'E_DISPOSED' })
      expect(native.stats().handles).toBe(handles)
    }
  })

  test('produces the same tokens for concurrent texts as in sequence', async () => {
    const { counts, recorded, plain } = models({ num_nextn_predict_layers: 1 })
    const all: GenerateOptions[] = [
      { maxTokens: 90, speculative: true },
      { maxTokens: 30, cacheDtype: 'bf16' },
      { maxTokens: 40, speculative: true, temperature: 0.9, seed: 2 },
      { maxTokens: 40, speculative: true, precision: 'bf16' },
    ]
    const together = await Promise.all(all.map(options => generated(recorded, options)))
    for (const [i, options] of all.entries()) expect(together[i]).toEqual(await generated(plain, options))
    expect(counts.captures).toBeGreaterThan(3)
    recorded.dispose()
    plain.dispose()
  })

  test('continues op by op if any op runs out of memory while recording', async () => {
    const config = { ...tiny, num_nextn_predict_layers: 1 }
    const model = new DeepSeek(config, { seed: 1, backend: native })
    const options = { maxTokens: 20, speculative: true }
    const expected = await generated(model, options)
    model.dispose()
    const { handles } = native.stats()
    /** The number of recorded ops until one runs out of memory. */
    let left = Number.POSITIVE_INFINITY
    let recording = false
    const failing = <Kernels extends object>(kernels: Kernels): Kernels =>
      Object.fromEntries(
        Object.entries(kernels).map(([name, kernel]) => [
          name,
          (...args: unknown[]) => {
            // A reshape takes no memory.
            if (recording && name !== 'reshape' && --left === 0) {
              throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: name, problem: 'full' })
            }
            return kernel(...args)
          },
        ]),
      ) as Kernels
    const backend: Backend = {
      ...native,
      primitives: failing(native.primitives),
      fused: failing(native.fused),
      capture(fn, captureOptions) {
        recording = true
        try {
          return native.capture(fn, captureOptions)
        } finally {
          recording = false
        }
      },
    }
    const small = new DeepSeek(config, { seed: 1, backend })
    let ops = 1
    do {
      left = ops
      expect(await generated(small, options)).toEqual(expected)
      ops++
    } while (left <= 0)
    expect(ops).toBeGreaterThan(50)
    small.dispose()
    expect(native.stats().handles).toBe(handles)
  })

  test('leaks nothing after an out-of-memory error, at every limit', async () => {
    const config = { ...tiny, num_nextn_predict_layers: 2 }
    const options = { maxTokens: 80, speculative: true }
    const unlimited = await createBackend({ threads: 1 })
    const model = new DeepSeek(config, { seed: 1, backend: unlimited })
    const { bytes } = unlimited.stats()
    const expected = await generated(model, options)
    unlimited.dispose()
    let refused = 0
    for (let limit = bytes, done = false; !done; limit += 2048) {
      const backend = await createBackend({ threads: 1, memoryLimit: limit })
      const small = new DeepSeek(config, { seed: 1, backend })
      try {
        expect(await generated(small, options)).toEqual(expected)
        done = true
      } catch (error) {
        if (!isMoeError(error, 'E_OUT_OF_MEMORY')) throw error
        refused++
      }
      small.dispose()
      expect(backend.stats().handles).toBe(0)
      backend.dispose()
    }
    expect(refused).toBeGreaterThan(10)
  })

  test('creating a model leaks nothing after an out-of-memory error', async () => {
    const config = { ...tiny, num_nextn_predict_layers: 2, mtp_separate_embeddings: true }
    const backend = await createBackend()
    const whole = new DeepSeek(config, { seed: 1, backend })
    const { bytes } = backend.stats()
    whole.dispose()
    for (let limit = 2048; limit < bytes; limit += 4096) {
      const small = await createBackend({ threads: 1, memoryLimit: limit })
      for (const weights of [undefined, 'int8'] as const) {
        const make = () => new DeepSeek(config, { seed: 1, backend: small, weights })
        if (weights === undefined) expect(make).toThrow(expect.objectContaining({ code: 'E_OUT_OF_MEMORY' }))
        else
          await createModule(make).then(
            model => model.dispose(),
            error => expect(error.code).toBe('E_OUT_OF_MEMORY'),
          )
        expect(small.stats().handles).toBe(0)
      }
      small.dispose()
    }
    backend.dispose()
  })

  test('leaks nothing if a read fails on a backend that is used by one model only', async () => {
    for (const reads of [1, 2, 3, 6]) {
      const memory = await createBackend()
      let left = reads
      const download: Backend['download'] = value => {
        if (--left === 0) return Promise.reject(new Error('device lost'))
        return memory.download(value)
      }
      const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { backend: { ...memory, download } })
      await expect(generated(model, { maxTokens: 20, speculative: true })).rejects.toThrow('device lost')
      model.dispose()
      expect(memory.stats().handles).toBe(0)
      memory.dispose()
    }
  })

  test('uses weights that are trained or replaced during generation', async () => {
    const { recorded, plain } = models({})
    /** Takes a step of AdamW, in place if possible, so that most weights stay in the same memory. */
    const change = (model: DeepSeek) => {
      const random = new Random(5)
      scope(() => {
        for (const { name, parameter } of namedParameters(model)) {
          if (!parameter.trainable) continue
          const { shape, backend } = parameter
          const zeros = () => full([...shape], 0, { backend })
          const grad = randn([...shape], random.fork(name), { backend })
          const attrs = { lr: 0.05, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0, step: 1 }
          parameter.assign(adamwStep(parameter, grad, zeros(), zeros(), full([], 1, { backend }), attrs).param)
        }
      })
    }
    const run = (model: DeepSeek) => generated(model, { maxTokens: 24 }, n => (n === 8 || n === 15) && change(model))
    const ids = await run(recorded)
    expect(ids).toEqual(await run(plain))
    // Weights absorbed before the change are not used, although the new ones are in the same memory.
    const expected = prompt.slice()
    for (let i = 0; i < 5; i++) {
      const input = tensor(Int32Array.from(expected), [1, expected.length], { backend: recorded.backend })
      const logits = await recorded.infer(() => recorded.forward(input)).values()
      const last = logits.subarray(logits.length - tiny.vocab_size)
      expected.push(last.indexOf(Math.max(...last)))
    }
    expect(await generated(recorded, { maxTokens: 5 })).toEqual(expected.slice(prompt.length))
    recorded.dispose()
    plain.dispose()
  })
})
