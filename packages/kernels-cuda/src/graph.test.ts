import { fromHost, latentAttention, Random, randn, scope, type Tensor } from '@moe/core'
import { graphSuite } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { productVariants, testBackend, unavailable, wgmmaVariants } from './test-backend.ts'

for (const check of graphSuite(() => testBackend({ guarded: false }))) {
  test.skipIf(unavailable)(check.name, () => check.run())
}

test.skipIf(unavailable)('graphs cannot be captured with guarded memory', async () => {
  const backend = await testBackend()
  expect(() => backend.capture(() => {})).toThrow(/^capture: with `guarded`/)
  backend.dispose()
})

test.skipIf(unavailable)('what waits for the device fails during a capture, which is not affected', async () => {
  const backend = await testBackend({ guarded: false })
  const x = randn([10], new Random(1), { backend })
  const attempts: Promise<unknown>[] = []
  const graph = backend.capture(() => {
    attempts.push(
      x.values(),
      backend.sync(),
      backend.trim(),
      backend.elapsed(() => x.neg().dispose()),
    )
    return x.mul(2)
  })
  const all = await Promise.allSettled(attempts)
  for (const attempt of all) expect(attempt).toMatchObject({ status: 'rejected', reason: { code: 'E_ATTR' } })
  graph.replay()
  expect(await graph.result.values()).toEqual((await x.values()).map(value => 2 * value))
  backend.dispose()
})

test.skipIf(!wgmmaVariants.includes(true))(
  'products on Hopper: a graph has its own copies of tensor maps',
  async () => {
    const backend = await testBackend({ guarded: false, wgmma: true })
    const [a, b] = [randn([130, 96], new Random(1), { backend }), randn([140, 96], new Random(2), { backend })]
    const other = randn([130, 96], new Random(3), { backend })
    const product = (x: Tensor) => x.matmul(b, { transposeB: true, precision: 'bf16' })
    product(a).dispose()
    const graph = backend.capture(() => product(a))
    const expected = await product(other).values()
    backend.write(a, await other.values())
    graph.replay()
    expect(await graph.result.values()).toEqual(expected)
    backend.dispose()
  },
)

describe.skipIf(unavailable).each(productVariants)('$precision, wgmma $wgmma', ({ precision, wgmma }) => {
  test('attention over a paged cache uses the pages and lengths written before a replay', async () => {
    const backend = await testBackend({ guarded: false, wgmma })
    const i32 = (values: number[], ...shape: number[]) => fromHost(Int32Array.from(values), shape, 'i32', backend)
    const q = randn([2, 1, 4, 48], new Random(1), { backend })
    const cache = randn([6, 16, 48], new Random(2), { backend }).cast('bf16')
    const lengths = i32([20, 3], 2)
    const pages = i32([4, 2, 1, 1], 2, 2)
    const run = () => latentAttention(q, cache, lengths, { scale: 0.2, valueDim: 32, precision, pages })
    const first = await run().values()
    const graph = backend.capture(run)
    backend.write(pages, Int32Array.of(0, 3, 5, 2))
    backend.write(lengths, Int32Array.of(32, 17))
    graph.replay()
    const replayed = await graph.result.values()
    expect(replayed).toEqual(await run().values())
    expect(replayed).not.toEqual(first)
    backend.dispose()
  })
})

test.skipIf(unavailable)(
  'capturing and freeing graphs repeatedly takes no more memory than the first one',
  async () => {
    const backend = await testBackend({ guarded: false })
    const x = randn([300, 1000], new Random(1), { backend })
    const run = () => scope(() => [x.mul(2).exp().sum(), x.slice([0, 0], [20, 30]).exp()])
    const reserved: number[] = []
    for (let i = 0; i < 4; i++) {
      const graph = backend.capture(run)
      graph.replay()
      for (const tensor of graph.result) tensor.dispose()
      graph.dispose()
      reserved.push(backend.stats().peakReservedBytes)
    }
    expect(reserved).toEqual(reserved.map(() => reserved[0]))
    backend.dispose()
  },
)
