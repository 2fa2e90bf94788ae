/** @file Rounded copies of operands are computed once, shared by all products that need them, and never outlive the values they were computed from. */
import {
  adamwStep,
  attention,
  backward,
  full,
  mlaKeyValue,
  Parameter,
  Random,
  randn,
  rope,
  scope,
  setRows,
  type Tensor,
  tensor,
  type WidePrecision,
} from '@moe/core'
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
  /** Computes the product of copies of the tensors, which have never been rounded. */
  async function productOfCopies(x: Tensor, w: Tensor): Promise<number[]> {
    const [a, b] = [x, w].map(async t => tensor(await t.values(), t.shape, { backend }))
    return values(product(await a, await b))
  }

  test('are rounded once for all products of the forward and backward pass', () => {
    const x = new Parameter(normal(64, 32))
    const [w, u] = [new Parameter(normal(48, 32)), new Parameter(normal(48, 32))]
    const seed = normal(64, 48)
    const launches = (fn: () => void) => {
      const before = backend.stats().launches
      scope(fn)
      return backend.stats().launches - before
    }
    // First product: two operands and the product. Second product: one operand less.
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

  test('are updated when an optimizer step changes a parameter in place', async () => {
    const [x, w] = [normal(64, 32), new Parameter(normal(48, 32))]
    const [m, v] = [full([48, 32], 0, { backend }), full([48, 32], 0, { backend })].map(t => new Parameter(t))
    const attrs = { lr: 0.5, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, step: 1 }
    product(x, w)
    const next = adamwStep(w, normal(48, 32), m, v, full([], 1, { backend }), attrs)
    w.assign(next.param)
    expect(await values(product(x, w))).toEqual(await productOfCopies(x, w))
  })

  test('are updated after writes and in-place updates', async () => {
    let x = normal(64, 32)
    const w = normal(48, 32)
    product(x, w)
    backend.write(x, random.normal(64 * 32))
    expect(await values(product(x, w))).toEqual(await productOfCopies(x, w))
    x = setRows(x, tensor(Int32Array.of(3), [1], { backend }), normal(1, 32), { donate: true })
    expect(await values(product(x, w))).toEqual(await productOfCopies(x, w))
  })

  test('of tensors that a graph writes reflect its latest replay, inside and outside of the graph', async () => {
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
      const expected = await productOfCopies(x, w)
      // Computed between replays, from the weight and from a result.
      product(x, w)
      if (i > 0) product(graph.result, graph.result)
      graph.replay()
      expect(await values(graph.result)).toEqual(expected)
      expect(await values(product(x, w))).toEqual(await productOfCopies(x, w))
      expect(await values(product(graph.result, graph.result))).toEqual(
        await productOfCopies(graph.result, graph.result),
      )
    }
    graph.dispose()
  })

  test('do not count as tensors, and are freed with their tensor and when an op fails', async () => {
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
    expect(() => product(b, a)).toThrow(/cannot allocate/)
    filler.dispose()
    expect(await once()).toEqual(expected)
    limited.dispose()
  })
})

describe.skipIf(unavailable).each(wgmmaVariants)('outputs, wgmma %s', wgmma => {
  const [B, T, H, N, R, V, hidden] = [2, 20, 2, 48, 16, 64, 24]
  const random = new Random(7)
  let backend: CudaBackend
  let make: (...shape: number[]) => Parameter
  let latent: Parameter
  let weights: readonly Parameter[]
  let ropeKey: Tensor
  let angles: readonly Tensor[]
  beforeEach(async () => {
    backend = await testBackend({ wgmma })
    make = (...shape) => new Parameter(randn(shape, random, { backend }))
    latent = make(B, T, hidden)
    weights = [make(H * (N + R), hidden), make(H * (N + V), hidden)]
    ropeKey = make(B, T, 1, R).detach()
    angles = [make(T, R / 2).detach(), make(T, R / 2).detach()]
    // Tensors that do not change are rounded once.
    scope(() => weights.map(w => latent.matmul(w, { transposeB: true, precision: 'bf16' })))
  })
  afterEach(() => backend.dispose())

  /** Computes attention and gradients. With `copies`, computes only attention, of uploaded copies of its inputs, which no op has rounded. */
  async function pass(precision: WidePrecision, copies = false) {
    const before = backend.stats().launches
    const [q, kv] = weights.map((w, i) =>
      latent.matmul(w, { transposeB: true, precision }).reshape([B, T, H, i === 0 ? N + R : N + V]),
    )
    const turned = rope(q, angles[0], angles[1])
    const { k, v } = mlaKeyValue(kv, ropeKey, N)
    const read = copies
      ? await Promise.all([turned, k, v].map(async x => tensor(await x.values(), x.shape, { backend })))
      : [turned, k, v]
    const out = attention(read[0], read[1], read[2], { precision })
    const values = [await out.values()]
    if (!copies) {
      backward(out.mul(out).mean())
      for (const x of [latent, ...weights]) {
        values.push(await (x.grad as Tensor).values())
        x.zeroGrad()
      }
    }
    const launches = backend.stats().launches - before
    for (const x of [q, kv, turned, k, v, out, ...(copies ? read : [])]) x.dispose()
    return { values, launches }
  }

  test('are rounded by the op that computes them, once the latest outputs of this kind were read as bf16', async () => {
    const first = await pass('bf16')
    const second = await pass('bf16')
    // Queries, keys and values at once; the gradients of queries, and of keys and values.
    expect(second.launches).toBe(first.launches - 3)
    const third = await pass('bf16')
    expect(third.launches).toBe(second.launches)
    for (const { values } of [second, third]) expect(values).toEqual(first.values)
    expect((await pass('bf16', true)).values[0]).toEqual(first.values[0])
  })

  test('are no longer rounded when none was read as bf16', async () => {
    const [first, second] = [await pass('bf16'), await pass('bf16')]
    const wide = await pass('f32')
    const [third, fourth] = [await pass('bf16'), await pass('bf16')]
    expect([third.launches, fourth.launches]).toEqual([first.launches, second.launches])
    expect(third.values).toEqual(first.values)
    expect((await pass('f32')).values).toEqual(wide.values)
  })

  test('are updated when they are written to', async () => {
    await pass('bf16')
    const x = make(B, T, H, N + R)
    const q = rope(x, angles[0], angles[1])
    const other = random.normal(q.size)
    backend.write(q, other)
    const { k, v } = mlaKeyValue(make(B, T, H, N + V), ropeKey, N)
    const [out, expected] = [q, tensor(other, q.shape, { backend })].map(x => attention(x, k, v, { precision: 'bf16' }))
    expect(await out.values()).toEqual(await expected.values())
  })

  test('are the same in a recorded step as outside of it', async () => {
    const backend = await testBackend({ wgmma, guarded: false })
    const [x, kv, key] = [
      [B, T, H, N + R],
      [B, T, H, N + V],
      [B, T, 1, R],
    ].map(shape => randn(shape, random, { backend }))
    const tables = angles.map(() => randn([T, R / 2], random, { backend }))
    const step = () =>
      scope(() => {
        const { k, v } = mlaKeyValue(kv, key, N)
        return attention(rope(x, tables[0], tables[1]), k, v, { precision: 'bf16' })
      })
    step()
    const graph = backend.capture(step)
    for (let i = 0; i < 3; i++) {
      backend.write(x, random.normal(x.size))
      backend.write(kv, random.normal(kv.size))
      graph.replay()
      expect(await graph.result.values()).toEqual(await step().values())
    }
    graph.dispose()
    backend.dispose()
  })
})

describe.skipIf(unavailable).each(wgmmaVariants)('operands in fp8, wgmma %s', wgmma => {
  test('are quantized once per axis that is summed over, and again when the parameter changes', async () => {
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
