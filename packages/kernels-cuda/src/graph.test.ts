import { Random, randn, scope, type Tensor } from '@moe/core'
import { graphSuite } from '@moe/core/testing'
import { expect, test } from 'vitest'
import { testBackend, unavailable, wgmmaVariants } from './test-backend.ts'

for (const check of graphSuite(() => testBackend({ guarded: false }))) {
  test.skipIf(unavailable)(check.name, () => check.run())
}

test.skipIf(unavailable)('guarded memory is refused, as a graph would record it', async () => {
  const backend = await testBackend()
  expect(() => backend.capture(() => {})).toThrow(/^capture: with `guarded`/)
  backend.dispose()
})

test.skipIf(!wgmmaVariants.includes(true))(
  'products of Hopper: the graph has its own copy of what the copy engine knows of a matrix',
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

test.skipIf(unavailable)('graphs one after the other take no more memory than the first', async () => {
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
})
