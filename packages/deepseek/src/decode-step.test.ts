/** @file Recorded decoding beside decoding op by op, on a backend that records. */
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

/** The backend with its replays counted, and as one that cannot record. */
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

async function made(model: DeepSeek, options: GenerateOptions, onToken?: (n: number) => void): Promise<number[]> {
  const ids: number[] = []
  for await (const id of model.generate(prompt, options)) {
    ids.push(id)
    onToken?.(ids.length)
  }
  return ids
}

/** The same model, on both backends. */
function models(config: object, options: DeepSeekOptions = {}) {
  const { counts, recording, eager } = pair()
  const make = (backend: Backend) => new DeepSeek({ ...tiny, ...config }, { seed: 1, ...options, backend })
  return { counts, recorded: make(recording), plain: make(eager) }
}

describe('recorded decoding', () => {
  test('produces the same tokens as op by op, also when the cache grows, and leaks nothing', async () => {
    const { handles } = native.stats()
    const { counts, recorded, plain } = models({})
    // 64 positions at first: the cache grows once, and the graph is recorded anew.
    const options = { maxTokens: 90 }
    expect(await made(recorded, options)).toEqual(await made(plain, options))
    expect(counts.captures).toBeGreaterThan(0)
    expect(counts.replays).toBeGreaterThan(80)
    recorded.dispose()
    plain.dispose()
    expect(native.stats().handles).toBe(handles)
  })

  test.each(['bf16', 'fp8', 'int8', 'int4'] as const)('with weights in %s', async weights => {
    const { counts, recorded, plain } = models({ hidden_size: 32 }, { weights })
    const options = { maxTokens: 20 }
    expect(await made(recorded, options)).toEqual(await made(plain, options))
    expect(counts.replays).toBe(18)
    recorded.dispose()
    plain.dispose()
  })

  test('with drafts, sampled or greedy', async () => {
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
      expect(ids).toEqual(await made(plain, options))
      // The main model and both modules: all but the prompt and the first two runs of each length.
      const passes = 3 * text.stats.steps
      expect(counts.replays - replays).toBeGreaterThan(passes - 3 * 6)
    }
    recorded.dispose()
    plain.dispose()
  })

  test('continues op by op without memory for a graph', async () => {
    const { handles } = native.stats()
    const { recording, eager } = pair()
    let refused = 0
    const full: Backend = {
      ...recording,
      capture(fn) {
        return native.capture(() => {
          for (const made of Object.values(fn() as Record<string, Tensor>)) made.dispose()
          refused++
          throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: 'matmul', problem: 'no memory' })
        })
      },
    }
    const [short, plain] = [full, eager].map(
      backend => new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { seed: 1, backend }),
    )
    const options = { maxTokens: 40, speculative: true }
    expect(await made(short, options)).toEqual(await made(plain, options))
    // Each cache gives up once.
    expect(refused).toBe(3)
    short.dispose()
    plain.dispose()
    expect(native.stats().handles).toBe(handles)
  })

  test('too little memory is an error that leaves nothing behind', async () => {
    const config = { ...tiny, num_nextn_predict_layers: 2 }
    const options = { maxTokens: 80, speculative: true, cacheDtype: 'bf16' } as const
    const generated = async (memoryLimit?: number) => {
      const backend = await createBackend({ memoryLimit })
      const model = new DeepSeek(config, { seed: 1, backend })
      const { bytes: weights } = backend.stats()
      const ids = await made(model, options).catch(error => error as Error)
      model.dispose()
      const { handles, bytes, peakBytes } = backend.stats()
      backend.dispose()
      expect({ handles, bytes }).toEqual({ handles: 0, bytes: 0 })
      return { ids, weights, peakBytes }
    }
    const { ids, weights, peakBytes } = await generated()
    for (const share of [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]) {
      const short = await generated(weights + Math.floor(share * (peakBytes - weights)))
      if (Array.isArray(short.ids)) expect(short.ids).toEqual(ids)
      else expect(short.ids).toMatchObject({ code: 'E_OUT_OF_MEMORY' })
    }
  })

  test.each([1, 2, 3, 9, 10, 11, 40, 41, 42])('a read that fails (%i) leaves nothing behind', async fails => {
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
    await expect(made(model, { maxTokens: 60, speculative: true })).rejects.toThrow(/the device is lost/)
    model.dispose()
    expect(native.stats().handles).toBe(handles)
  })

  test('disposing the model ends the text: nothing is replayed over freed memory', async () => {
    for (const after of [1, 2, 3, 9, 20]) {
      const { recording } = pair()
      const { handles } = native.stats()
      const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: after % 2 }, { seed: 1, backend: recording })
      const text = made(model, { maxTokens: 60, speculative: true }, n => n === after && model.dispose())
      await expect(text).rejects.toMatchObject({ code: 'E_DISPOSED' })
      expect(native.stats().handles).toBe(handles)
    }
  })

  test('texts generated concurrently equal those generated in sequence', async () => {
    const { counts, recorded, plain } = models({ num_nextn_predict_layers: 1 })
    const all: GenerateOptions[] = [
      { maxTokens: 90, speculative: true },
      { maxTokens: 30, cacheDtype: 'bf16' },
      { maxTokens: 40, speculative: true, temperature: 0.9, seed: 2 },
      { maxTokens: 40, speculative: true, precision: 'bf16' },
    ]
    const together = await Promise.all(all.map(options => made(recorded, options)))
    for (const [i, options] of all.entries()) expect(together[i]).toEqual(await made(plain, options))
    expect(counts.captures).toBeGreaterThan(3)
    recorded.dispose()
    plain.dispose()
  })

  test('continues op by op if memory runs out anywhere while recording', async () => {
    const config = { ...tiny, num_nextn_predict_layers: 1 }
    const model = new DeepSeek(config, { seed: 1, backend: native })
    const options = { maxTokens: 20, speculative: true }
    const expected = await made(model, options)
    model.dispose()
    const { handles } = native.stats()
    /** Ops of a recording until one finds no memory. */
    let left = Number.POSITIVE_INFINITY
    let recording = false
    const failing = <Kernels extends object>(kernels: Kernels): Kernels =>
      Object.fromEntries(
        Object.entries(kernels).map(([name, kernel]) => [
          name,
          (...of: unknown[]) => {
            // A reshape takes no memory.
            if (recording && name !== 'reshape' && --left === 0) {
              throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: name, problem: 'full' })
            }
            return kernel(...of)
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
      expect(await made(small, options)).toEqual(expected)
      ops++
    } while (left <= 0)
    expect(ops).toBeGreaterThan(50)
    small.dispose()
    expect(native.stats().handles).toBe(handles)
  })

  test('where memory is too short, an error leaves nothing behind', async () => {
    const config = { ...tiny, num_nextn_predict_layers: 2 }
    const options = { maxTokens: 80, speculative: true }
    const roomy = await createBackend({ threads: 1 })
    const model = new DeepSeek(config, { seed: 1, backend: roomy })
    const { bytes } = roomy.stats()
    const expected = await made(model, options)
    roomy.dispose()
    let refused = 0
    for (let limit = bytes, done = false; !done; limit += 2048) {
      const backend = await createBackend({ threads: 1, memoryLimit: limit })
      const small = new DeepSeek(config, { seed: 1, backend })
      try {
        expect(await made(small, options)).toEqual(expected)
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

  test('a model for which memory is too short leaves nothing of itself', async () => {
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

  test('a read that fails leaves nothing behind', async () => {
    for (const reads of [1, 2, 3, 6]) {
      const memory = await createBackend()
      let left = reads
      const download: Backend['download'] = value => {
        if (--left === 0) return Promise.reject(new Error('device lost'))
        return memory.download(value)
      }
      const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: 2 }, { backend: { ...memory, download } })
      await expect(made(model, { maxTokens: 20, speculative: true })).rejects.toThrow('device lost')
      model.dispose()
      expect(memory.stats().handles).toBe(0)
      memory.dispose()
    }
  })

  test('follows weights that are trained or replaced meanwhile', async () => {
    const { recorded, plain } = models({})
    /** AdamW in place where it can be, so that most weights stay in their memory. */
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
    const run = (model: DeepSeek) => made(model, { maxTokens: 24 }, n => (n === 8 || n === 15) && change(model))
    const ids = await run(recorded)
    expect(ids).toEqual(await run(plain))
    // What was absorbed from the weights of before is not used, although the new ones lie in the same memory.
    const expected = prompt.slice()
    for (let i = 0; i < 5; i++) {
      const input = tensor(Int32Array.from(expected), [1, expected.length], { backend: recorded.backend })
      const logits = await recorded.infer(() => recorded.forward(input)).values()
      const last = logits.subarray(logits.length - tiny.vocab_size)
      expected.push(last.indexOf(Math.max(...last)))
    }
    expect(await made(recorded, { maxTokens: 5 })).toEqual(expected.slice(prompt.length))
    recorded.dispose()
    plain.dispose()
  })
})
