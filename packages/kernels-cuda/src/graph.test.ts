import {
  adamwStep,
  backward,
  full,
  isMoeError,
  Linear,
  Parameter,
  Random,
  randn,
  scope,
  setRows,
  type Tensor,
  tensor,
} from '@moe/core'
import { describe, expect, test } from 'vitest'
import type { CudaBackend } from './backend.ts'
import { testBackend, unavailable } from './test-backend.ts'

const attrs = { lr: 0.05, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.01, step: 1 }

/** A model, its optimizer and one step of them, as a user would write it. */
function trainer(backend: CudaBackend) {
  const random = new Random(3)
  const model = new Linear(8, 4, { random, backend })
  const x = randn([16, 8], new Random(4), { backend })
  const y = randn([16, 4], new Random(5), { backend })
  const m = new Parameter(full([4, 8], 0, { backend }))
  const v = new Parameter(full([4, 8], 0, { backend }))
  /** A statistic that every step replaces: the state that is not donated. */
  const average = new Parameter(full([], 0, { backend }))
  const one = full([], 1, { backend })
  const step = (now: typeof attrs) =>
    scope(() => {
      const error = model.forward(x).sub(y)
      const loss = error.mul(error).mean()
      backward(loss)
      const next = adamwStep(model.weight, model.weight.grad as Tensor, m, v, one, now)
      model.weight.assign(next.param)
      m.assign(next.m)
      v.assign(next.v)
      model.weight.zeroGrad()
      average.assign(average.mul(0.5).add(loss.detach().mul(0.5)))
      return loss.detach()
    })
  return { model, x, y, m, v, average, step }
}

/** Losses and end state of four steps: the first eagerly, the others eagerly or from a graph. */
async function run(graphed: boolean) {
  const backend = await testBackend({ guarded: false })
  const { model, average, step } = trainer(backend)
  const losses: number[] = []
  const first = step(attrs)
  losses.push(await first.item())
  if (graphed) {
    const graph = backend.capture(() => step({ ...attrs, step: 2 }), { state: [average, model.weight] })
    for (let t = 2; t <= 4; t++) {
      graph.replay({ adamwStep: now => ({ ...now, lr: attrs.lr / t, step: t }) })
      losses.push(await graph.result.item())
    }
  } else {
    for (let t = 2; t <= 4; t++) losses.push(await step({ ...attrs, lr: attrs.lr / t, step: t }).item())
  }
  const state = { losses, weight: await model.weight.values(), average: await average.item() }
  backend.dispose()
  return state
}

describe.skipIf(unavailable)('graphs', () => {
  test('a replayed training step is the eager one, bit for bit, at learning rates of its own', async () => {
    expect(await run(true)).toEqual(await run(false))
  })

  test('inputs are written in place, and what runs between replays disturbs nothing', async () => {
    const backend = await testBackend({ guarded: false })
    const x = tensor([1, 2, 3, 4], [4], { backend })
    const run = () =>
      scope(() =>
        x
          .mul(2)
          .add(tensor([10, 20, 30, 40], [4], { backend }))
          .exp()
          .log(),
      )
    run().dispose()
    const graph = backend.capture(run)
    const results: number[][] = []
    for (const data of [
      [1, 2, 3, 4],
      [5, 6, 7, 8],
    ]) {
      backend.write(x, Float32Array.from(data))
      const others = Array.from({ length: 8 }, (_, i) => full([4], i, { backend }))
      graph.replay()
      for (const other of others) other.dispose()
      results.push([...(await graph.result.values())].map(Math.round))
    }
    expect(results).toEqual([
      [12, 24, 36, 48],
      [20, 32, 44, 56],
    ])
    graph.dispose()
    expect([...(await graph.result.values())].map(Math.round)).toEqual(results[1])
    expect(() => graph.replay()).toThrow(/disposed/)
    backend.dispose()
  })

  test('rows set in a donated tensor, as a cache is', async () => {
    const backend = await testBackend({ guarded: false })
    let cache = full([4, 2], 0, { backend })
    const index = tensor(Int32Array.of(1), [1], { backend })
    const row = tensor([1, 2], [1, 2], { backend })
    const put = () => {
      cache = setRows(cache, index, row, { donate: true })
    }
    put()
    const graph = backend.capture(put)
    backend.write(index, Int32Array.of(3))
    graph.replay()
    expect([...(await cache.values())]).toEqual([0, 0, 1, 2, 0, 0, 1, 2])
    graph.dispose()
    backend.dispose()
  })

  test('reading while recording is refused, and the stream works afterwards', async () => {
    const backend = await testBackend({ guarded: false })
    const x = tensor([1, 2], [2], { backend })
    const pending: Array<Promise<unknown>> = []
    const graph = backend.capture(() => {
      pending.push(x.values())
      return x.neg()
    })
    await expect(pending[0]).rejects.toThrow(/while a graph is recorded/)
    expect(() => backend.capture(async () => {})).toThrow(/promise/)
    expect(() =>
      backend.capture(() => {
        throw new Error('mine')
      }),
    ).toThrow('mine')
    expect(
      isMoeError(
        await x
          .neg()
          .values()
          .catch(error => error),
      ),
    ).toBe(false)
    graph.dispose()
    backend.dispose()
  })

  test('memory: a disposed graph gives back what it took', async () => {
    const backend = await testBackend({ guarded: false })
    const x = tensor([1, 2], [2], { backend })
    const handles = backend.stats().handles
    const graph = backend.capture(() => scope(() => x.exp().add(tensor([1, 1], [2], { backend }))))
    graph.replay()
    expect((await graph.result.values()).length).toBe(2)
    graph.result.dispose()
    graph.dispose()
    expect(backend.stats().handles).toBe(handles)
    backend.dispose()
  })
})
