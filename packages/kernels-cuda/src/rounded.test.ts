/** @file Operands in fewer bits are made once and shared by the products that need them, and never outlive the elements that they were made of. */
import { adamwStep, backward, full, Parameter, Random, randn, scope, setRows, type Tensor, tensor } from '@moe/core'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { CudaBackend } from './index.ts'
import { testBackend, unavailable, wgmmaVariants } from './test-backend.ts'

describe.skipIf(unavailable)('operands in bf16', () => {
  let backend: CudaBackend
  beforeEach(async () => {
    backend = await testBackend({ guarded: false })
  })
  afterEach(() => backend.dispose())

  const random = new Random(7)
  const normal = (...shape: number[]) => randn(shape, random, { backend })
  const product = (x: Tensor, w: Tensor) => x.matmul(w, { transposeB: true, precision: 'bf16' })
  const values = async (x: Tensor) => Array.from(await x.values())
  /** The product of tensors that nobody has multiplied before. */
  async function anew(x: Tensor, w: Tensor): Promise<number[]> {
    const [a, b] = [x, w].map(async t => tensor(await t.values(), t.shape, { backend }))
    return values(product(await a, await b))
  }

  test('are rounded once for all products, forward and backward', () => {
    const x = new Parameter(normal(64, 32))
    const [w, u] = [new Parameter(normal(48, 32)), new Parameter(normal(48, 32))]
    const seed = normal(64, 48)
    const launches = (fn: () => void) => {
      const before = backend.stats().launches
      scope(fn)
      return backend.stats().launches - before
    }
    // Of the first, two operands and the product; of the second, one operand less.
    expect([launches(() => product(x, w)), launches(() => product(x, u)), launches(() => product(x, u))]).toEqual([
      2, 2, 1,
    ])
    const passes = launches(() => {
      const y = product(x, w)
      backward(y, { gradient: seed })
    })
    // Forward, the seed's copy, dx and dw.
    expect(passes).toBe(4)
  })

  test('follow a parameter through optimizer steps in place', async () => {
    const [x, w] = [normal(64, 32), new Parameter(normal(48, 32))]
    const [m, v] = [full([48, 32], 0, { backend }), full([48, 32], 0, { backend })].map(t => new Parameter(t))
    const attrs = { lr: 0.5, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, step: 1 }
    product(x, w)
    const next = adamwStep(w, normal(48, 32), m, v, full([], 1, { backend }), attrs)
    w.assign(next.param)
    expect(await values(product(x, w))).toEqual(await anew(x, w))
  })

  test('follow what is written and what is set in place', async () => {
    let x = normal(64, 32)
    const w = normal(48, 32)
    product(x, w)
    backend.write(x, random.normal(64 * 32))
    expect(await values(product(x, w))).toEqual(await anew(x, w))
    x = setRows(x, tensor(Int32Array.of(3), [1], { backend }), normal(1, 32), { donate: true })
    expect(await values(product(x, w))).toEqual(await anew(x, w))
  })

  test('of what a graph writes are those of its latest replay, inside of it and outside', async () => {
    const [x, w, change] = [normal(64, 32), new Parameter(normal(48, 32)), normal(48, 32)]
    const step = () =>
      scope(() => {
        const y = product(x, w)
        w.assign(w.add(change))
        return y
      })
    step()
    const graph = backend.capture(step, { state: [w] })
    for (let i = 0; i < 3; i++) {
      backend.write(x, random.normal(64 * 32))
      const expected = await anew(x, w)
      // Made between replays, of the weight and of a result.
      product(x, w)
      if (i > 0) product(graph.result, graph.result)
      graph.replay()
      expect(await values(graph.result)).toEqual(expected)
      expect(await values(product(x, w))).toEqual(await anew(x, w))
      expect(await values(product(graph.result, graph.result))).toEqual(await anew(graph.result, graph.result))
    }
    graph.dispose()
  })

  test('are no tensors, go with theirs, and when an op fails', async () => {
    const [x, w] = [normal(64, 32), normal(48, 32)]
    const before = backend.stats()
    product(x, w).dispose()
    expect(backend.stats()).toMatchObject({ handles: before.handles, bytes: before.bytes })
    const reserved: number[] = []
    for (let i = 0; i < 100; i++) {
      const [a, b] = [normal(640, 32), normal(48, 32)]
      for (const t of [product(a, b), a, b]) t.dispose()
      reserved.push(backend.stats().peakReservedBytes)
    }
    expect(reserved[99]).toBe(reserved[0])
    const limited = await testBackend({ guarded: false, memoryLimit: 40_000 })
    const [a, b] = [randn([64, 32], random, { backend: limited }), randn([64, 32], random, { backend: limited })]
    const once = async () => {
      const y = product(a, b)
      const data = await y.data()
      y.dispose()
      return data
    }
    const expected = await once()
    const filler = full([4000], 0, { backend: limited })
    expect(() => product(b, a)).toThrow(/no memory/)
    filler.dispose()
    expect(await once()).toEqual(expected)
    limited.dispose()
  })
})

describe.skipIf(unavailable).each(wgmmaVariants)('operands in fp8, wgmma %s', wgmma => {
  test('are rounded once for each axis that is summed over, and follow the parameter', async () => {
    const backend = await testBackend({ guarded: false, wgmma })
    const random = new Random(7)
    const normal = (...shape: number[]) => randn(shape, random, { backend })
    const [x, w, u] = [normal(128, 128), normal(128, 128), normal(128, 128)].map(t => new Parameter(t))
    const seed = normal(128, 128)
    const product = (a: Tensor, b: Tensor) => a.matmul(b, { transposeB: true, precision: 'fp8' })
    const launches = (fn: () => void) => {
      const before = backend.stats().launches
      scope(fn)
      return backend.stats().launches - before
    }
    expect([launches(() => product(x, w)), launches(() => product(x, u)), launches(() => product(x, u))]).toEqual([
      3, 2, 1,
    ])
    // Forward, the seed along and across, w and x across, dx and dw.
    expect(launches(() => backward(product(x, w), { gradient: seed }))).toBe(7)
    x.assign(normal(128, 128))
    const copies = await Promise.all([x, w].map(async t => tensor(await t.values(), t.shape, { backend })))
    expect(await product(x, w).values()).toEqual(await product(copies[0], copies[1]).values())
    backend.dispose()
  })
})
