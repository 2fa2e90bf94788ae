import {
  adamwStep,
  type Backend,
  backward,
  crossEntropy,
  Embedding,
  full,
  isMoeError,
  Linear,
  noGrad,
  type Parameter,
  Random,
  scope,
  type Tensor,
  tensor,
  where,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import * as tf from '@tensorflow/tfjs-core'
import '@tensorflow/tfjs-backend-cpu'
import '@tensorflow/tfjs-backend-wasm'
import { beforeAll, describe, expect, test } from 'vitest'
import { tfjsBackend } from './tfjs-backend.ts'

let backend: Backend

beforeAll(async () => {
  await tf.setBackend('cpu')
  await tf.setBackend('wasm')
  backend = tfjsBackend(tf)
})

const buffers = () => (tf.backend() as unknown as { numDataIds(): number }).numDataIds()

test('an uninitialized backend is rejected with the call that initializes it', () => {
  expect.assertions(2)
  try {
    tfjsBackend(tf, { backend: 'webgpu' })
  } catch (error) {
    expect(isMoeError(error, 'E_NO_BACKEND')).toBe(true)
    expect((error as Error).message).toContain('tf.setBackend')
  }
})

test('ops leave no tensors or buffers in TensorFlow.js, even inside tf.tidy', async () => {
  const before = { tensors: tf.memory().numTensors, buffers: buffers(), handles: backend.stats().handles }
  const x = tensor([1, 2, 3, 4], [2, 2], { backend })
  const made: Tensor[] = []
  tf.tidy(() => {
    made.push(scope(() => x.matmul(x, { transposeB: true }).add(1).max(-1)))
  })
  const [y] = made
  expect(await y.values()).toEqual(Float32Array.of(12, 26))
  x.dispose()
  y.dispose()
  expect({ tensors: tf.memory().numTensors, buffers: buffers(), handles: backend.stats().handles }).toEqual(before)
})

test('a tensor that is disposed during an asynchronous read, as on webgpu, is freed after the read', async () => {
  const kernels = tf.backend() as unknown as { read(id: object): Promise<unknown>; readSync(id: object): unknown }
  const { read } = kernels
  kernels.read = async id => {
    await new Promise(resolve => setTimeout(resolve, 5))
    return kernels.readSync(id)
  }
  try {
    const before = tf.memory().numTensors
    const x = tensor([1, 2], [2], { backend })
    const reads = [x.values(), x.values()]
    x.dispose()
    expect(await Promise.all(reads)).toEqual([Float32Array.of(1, 2), Float32Array.of(1, 2)])
    expect(tf.memory().numTensors).toBe(before)
  } finally {
    kernels.read = read
  }
})

test('bytes count shared memory once', () => {
  const before = backend.stats().bytes
  const x = tensor(new Float32Array(100), [100], { backend })
  const y = x.reshape([10, 10])
  const mask = x.eq(0)
  expect(backend.stats().bytes - before).toBe(500)
  x.dispose()
  expect(backend.stats().bytes - before).toBe(500)
  y.dispose()
  expect(backend.stats().bytes - before).toBe(100)
  mask.dispose()
  expect(backend.stats().bytes).toBe(before)
})

test('dispose frees all buffers', () => {
  const own = tfjsBackend(tf)
  const before = buffers()
  const x = full([4], 1, { backend: own })
  x.reshape([2, 2])
  own.dispose()
  expect({ ...own.stats(), peakBytes: 0 }).toEqual({ handles: 0, bytes: 0, peakBytes: 0 })
  expect(buffers()).toBe(before)
  x.dispose()
})

test('two backends work on one namespace of TensorFlow.js, whichever is current', async () => {
  const other = tfjsBackend(tf, { backend: 'cpu' })
  const x = tensor([1, 2], [2], { backend: other })
  const y = tensor([1, 2], [2], { backend })
  const [a, b] = [x.exp(), y.exp()]
  expect(tf.getBackend()).toBe('wasm')
  assertClose('exp', await a.values(), await b.values())
  for (const t of [x, y, a, b]) t.dispose()
})

test('u8 values are downloaded unchanged, and any but 0 counts as true', async () => {
  for (const reads of ['views', 'async'] as const) {
    const own = tfjsBackend(tf, { backend: 'cpu', reads })
    const bytes = Uint8Array.from({ length: 256 }, (_, i) => i)
    const x = tensor(bytes, [256], { backend: own })
    expect(await x.data()).toEqual(bytes)
    const chosen = scope(() => where(x, full([], 1, { backend: own }), full([], 0, { backend: own })))
    expect(await chosen.values()).toEqual(Float32Array.from(bytes, byte => Math.min(byte, 1)))
    chosen.dispose()
    x.dispose()
  }
})

test('allocating more memory than wasm has is an error, and the backend stays usable', async () => {
  const { bytes } = backend.stats()
  expect(() => full([2 ** 30], 1, { backend })).toThrow(expect.objectContaining({ code: 'E_OUT_OF_MEMORY' }))
  expect(() => full([2 ** 31], 1, { backend })).toThrow(expect.objectContaining({ code: 'E_OUT_OF_MEMORY' }))
  expect(backend.stats().bytes).toBe(bytes)
  const x = full([3], 2, { backend })
  expect(await x.values()).toEqual(Float32Array.of(2, 2, 2))
  x.dispose()
})

describe('a matrix product', () => {
  // XNNPACK packs the right operand once and keeps the packed copy as long as the tensor exists; after a change in place, it would use the old values.
  test('uses the new values of an updated parameter', async () => {
    const x = tensor([1, 1], [1, 2], { backend })
    let w = tensor([1, 2, 3, 4], [2, 2], { backend })
    const first = x.matmul(w)
    const state = [full([2, 2], 0, { backend }), full([2, 2], 0, { backend }), full([], 1, { backend })]
    const grad = full([2, 2], 1, { backend })
    const attrs = { lr: 1, beta1: 0, beta2: 0, eps: 0, weightDecay: 0, step: 1 }
    const next = adamwStep(w, grad, state[0], state[1], state[2], attrs)
    w.dispose()
    w = next.param
    const second = x.matmul(w)
    expect([...(await first.values()), ...(await second.values())]).toEqual([4, 6, 2, 4])
    for (const t of [x, w, first, second, grad, next.m, next.v, ...state]) t.dispose()
  })

  test.each([
    [3, 200, 5, 70],
    [2, 1, 64, 300],
  ])('matches the reference in all four layouts: %i batches, [%i, %i] x [%i]', async (batch, m, k, n) => {
    const random = new Random(1)
    const [left, right] = [random.normal(batch * m * k), random.normal(batch * k * n)]
    for (const transposeA of [false, true]) {
      for (const transposeB of [false, true]) {
        const results = [backend, referenceBackend()].map(target =>
          scope(() => {
            const a = tensor(left, transposeA ? [batch, k, m] : [batch, m, k], { backend: target })
            const b = tensor(right, transposeB ? [batch, n, k] : [batch, k, n], { backend: target })
            return a.matmul(b, { transposeA, transposeB })
          }),
        )
        const [actual, expected] = await Promise.all(results.map(result => result.values()))
        assertClose('product', actual, expected, { relative: 1e-4, absolute: 1e-4 })
        for (const result of results) result.dispose()
      }
    }
  })
})

/** Trains a network to add two tokens modulo 8: an embedding, a hidden layer, cross-entropy and AdamW. Returns the losses. */
async function train(target: Backend, steps: number): Promise<number[]> {
  const random = new Random(5)
  const embedding = new Embedding(8, 12, { random, std: 0.4, backend: target })
  const layers = [
    new Linear(24, 32, { random, std: 0.4, backend: target }),
    new Linear(32, 8, { random, std: 0.4, backend: target }),
  ]
  const parameters: Parameter[] = [embedding.weight, layers[0].weight, layers[1].weight]
  const pairs = Array.from({ length: 64 }, (_, i) => [i >> 3, i & 7])
  const tokens = tensor(Int32Array.from(pairs.flat()), [64, 2], { backend: target })
  const targets = tensor(
    Int32Array.from(pairs, ([a, b]) => (a + b) % 8),
    [64],
    { backend: target },
  )
  const states = parameters.map(({ shape }) => ({
    m: full(shape, 0, { backend: target }),
    v: full(shape, 0, { backend: target }),
  }))
  const one = full([], 1, { backend: target })
  const losses: number[] = []
  for (let step = 1; step <= steps; step++) {
    const loss = scope(() => {
      const hidden = layers[0].forward(embedding.forward(tokens).reshape([64, 24])).tanh()
      const mean = crossEntropy(layers[1].forward(hidden), targets).mean()
      const result = mean.detach()
      backward(mean)
      return result
    })
    losses.push(await loss.item())
    loss.dispose()
    noGrad(() => {
      parameters.forEach((parameter, i) => {
        const { m, v } = states[i]
        const attrs = { lr: 0.02, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.01, step }
        const next = adamwStep(parameter, parameter.grad as Tensor, m, v, one, attrs)
        parameter.assign(next.param)
        m.dispose()
        v.dispose()
        states[i] = { m: next.m, v: next.v }
        parameter.zeroGrad()
      })
    })
  }
  for (const t of [tokens, targets, one, ...parameters, ...states.flatMap(({ m, v }) => [m, v])]) t.dispose()
  return losses
}

test('a two-layer network with an embedding trains on wasm like on the reference, and leaks nothing', async () => {
  const before = { handles: backend.stats().handles, buffers: buffers() }
  const losses = await train(backend, 80)
  expect(losses[79]).toBeLessThan(losses[0] / 10)
  assertClose('first 20 losses', losses.slice(0, 20), await train(referenceBackend(), 20), {
    relative: 1e-4,
    absolute: 1e-5,
  })
  expect({ handles: backend.stats().handles, buffers: buffers() }).toEqual(before)
})
