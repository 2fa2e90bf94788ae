import { type Backend, crossEntropy, full, isMoeError, noGrad, Random, randn, scope, softmax, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { afterEach, describe, expect, test } from 'vitest'
import { createBackend, webgpuBackend } from './backend.ts'
import type { GpuDevice } from './gpu.ts'
import { testBackend } from './test-gpu.ts'

const gpu = await testBackend()

describe('without a GPU', () => {
  const before = process.env.MOE_WEBGPU
  afterEach(() => {
    if (before === undefined) delete process.env.MOE_WEBGPU
    else process.env.MOE_WEBGPU = before
  })

  test.skipIf(gpu !== null)('createBackend says what to install', async () => {
    process.env.MOE_WEBGPU = 'no-such-package-of-webgpu'
    const error = await createBackend().catch(cause => cause)
    expect(isMoeError(error, 'E_NO_BACKEND')).toBe(true)
    expect(error.message).toMatch(/npm install webgpu/)
  })

  test.skipIf(gpu !== null)('a software adapter is used only on request', async () => {
    const adapter =
      "{ info: { vendor: 'google', architecture: '', device: '', description: 'SwiftShader', isFallbackAdapter: true }, limits: {} }"
    process.env.MOE_WEBGPU = `data:text/javascript,export const create = () => ({ requestAdapter: async () => (${adapter}) })`
    const error = await createBackend().catch(cause => cause)
    expect(isMoeError(error, 'E_NO_BACKEND')).toBe(true)
    expect(error.message).toMatch(/google SwiftShader.*software: true/s)
    const requested = await createBackend({ software: true }).catch(cause => cause)
    expect(requested.message).toMatch(/could not be opened/)
  })

  test('an unknown option is rejected', () => {
    expect(() => webgpuBackend({} as GpuDevice, { nam: 'x' } as never)).toThrow(
      expect.objectContaining({ code: 'E_CONFIG' }),
    )
  })
})

describe.skipIf(gpu === null)('a backend on a GPU', () => {
  const backend = gpu as Backend

  test('runs more kernels than fit one submission, with reused memory', async () => {
    const random = new Random(3)
    const values = random.normal(40 * 30)
    const run = (backend: Backend) =>
      noGrad(() =>
        scope(() => {
          let x = tensor(values, [40, 30], { backend })
          for (let i = 0; i < 300; i++) x = softmax(x.add(0.1)).mul(3).sub(1).reshape([30, 40]).permute([1, 0])
          return x
        }),
      )
    const [actual, expected] = [run(backend), run(referenceBackend())]
    assertClose('300 rounds', await actual.values(), await expected.values(), { relative: 1e-3, absolute: 1e-4 })
    for (const x of [actual, expected]) x.dispose()
  })

  test('uploads into reused memory without changing earlier work that reads it', async () => {
    const x = tensor(new Float32Array(1000).fill(1), [1000], { backend })
    const y = x.add(1)
    x.dispose()
    const z = tensor(new Float32Array(1000).fill(5), [1000], { backend })
    expect((await y.values()).every(value => value === 2)).toBe(true)
    expect((await z.values()).every(value => value === 5)).toBe(true)
    y.dispose()
    z.dispose()
  })

  test('completes concurrent downloads with the right values', async () => {
    const tensors = Array.from({ length: 20 }, (_, i) => full([300], i, { backend }))
    const read = await Promise.all(tensors.map(x => x.values()))
    expect(read.map(values => values[299])).toEqual(tensors.map((_, i) => i))
    for (const x of tensors) x.dispose()
  })

  test('computes more elements than workgroups fit along one axis', async () => {
    const size = 65_535 * 64 + 77
    const x = full([size], 2, { backend })
    const y = scope(() => x.add(1).sum())
    expect(await y.item()).toBeCloseTo(size * 3, -2)
    x.dispose()
    y.dispose()
  })

  test('rejects a tensor above the binding limit, and stays usable', async () => {
    expect(() => full([2 ** 31], 1, { backend })).toThrow(expect.objectContaining({ code: 'E_OUT_OF_MEMORY' }))
    const x = full([3], 2, { backend })
    expect(await x.values()).toEqual(Float32Array.of(2, 2, 2))
    x.dispose()
  })

  test('computes a loss of 0 for ignored and invalid targets', async () => {
    const logits = randn([4, 9], new Random(1), { backend })
    const targets = tensor(Int32Array.of(3, -100, 8, 9), [4], { backend })
    const loss = scope(() => crossEntropy(logits, targets, { ignoreIndex: -100 }))
    const values = await loss.values()
    expect(values[1]).toBe(0)
    expect(values[3]).toBe(0)
    expect(values[0]).toBeGreaterThan(0)
    for (const x of [logits, targets, loss]) x.dispose()
  })

  test('works after cached memory is released', async () => {
    const before = backend.stats()
    full([5000], 1, { backend }).dispose()
    await backend.trim?.()
    const x = full([5000], 1, { backend })
    expect((await x.values())[4999]).toBe(1)
    x.dispose()
    expect(backend.stats().handles).toBe(before.handles)
  })
})
