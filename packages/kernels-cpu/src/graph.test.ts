import {
  type CaptureOptions,
  fromHost,
  type Graph,
  noGrad,
  quantizedGroupedMatmul,
  quantizedMatmul,
  quantizeWeight,
  Random,
  setDefaultBackend,
  Tensor,
} from '@moe/core'
import { graphSuite, type Recorder } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { createBackend } from './backend.ts'
import type { CpuBuffer } from './memory.ts'
import { profile, startProfile, stopProfile } from './profile.ts'

describe.each([false, true])('guarded %s', guarded => {
  for (const check of graphSuite(() => createBackend({ guarded }))) test(check.name, () => check.run())
})

describe('the suite finds', () => {
  type Edit = (graph: Graph<unknown>, backend: Recorder) => Partial<Graph<unknown>>
  /** Replaces parts of the graphs that a backend captures. */
  const graphs = (edit: Edit) => (backend: Recorder) => ({
    ...backend,
    capture<T>(fn: () => T, options?: CaptureOptions) {
      const graph = backend.capture(fn, options)
      return { ...graph, ...edit(graph as Graph<unknown>, backend) } as Graph<T>
    },
  })
  const withoutReplay = graphs(() => ({ replay() {} }))
  const withoutWrite = (backend: Recorder) => ({ ...backend, write() {} })
  const withoutState = (backend: Recorder) => ({ ...backend, capture: <T>(fn: () => T) => backend.capture(fn) })
  const freeingResults = graphs(({ result, dispose }, backend) => ({
    dispose() {
      dispose()
      if (result instanceof Tensor) backend.free(result.handle)
    },
  }))
  const reading = (backend: Recorder) => ({ ...backend, download: async () => Float32Array.of(-1, -2) })

  test.each<[string, string, (backend: Recorder) => Recorder]>([
    [
      'graphs that ignore new attributes',
      'a replayed training step',
      graphs(graph => ({ replay: () => graph.replay() })),
    ],
    ['graphs without state', 'a replayed training step', withoutState],
    ['inputs that are not written', 'inputs are written in place', withoutWrite],
    ['replays after disposal', 'inputs are written in place', graphs(({ replay }) => ({ replay, dispose() {} }))],
    ['an index that is not written', 'a replayed setRows', withoutWrite],
    ['state that stays', 'state may move', withoutReplay],
    ['reads during capture', 'reading during capture', reading],
    ['memory that is not freed', 'a disposed graph', graphs(() => ({ dispose() {} }))],
    ['state that a failure changed', 'a failed capture', withoutState],
    ['results that are freed twice', 'results outlive', freeingResults],
    ['programs that are not replayed', 'replayed random programs', withoutReplay],
  ])('%s', async (_, name, change) => {
    const check = graphSuite(async () => change(await createBackend({ guarded: true }))).find(item =>
      item.name.startsWith(`graphs: ${name}`),
    )
    await expect(check?.run()).rejects.toThrow()
  })
})

test('a profiled replay counts its kernels, and computes what any replay does', async () => {
  const backend = await createBackend()
  const spec = { shape: [2], dtype: 'f32' } as const
  const x = { handle: backend.upload(Float32Array.of(1, 2), [2], 'f32'), ...spec }
  const run = () => {
    const [negative] = backend.primitives.unary([x], { code: 'neg' }, [spec])
    const [sum] = backend.primitives.binary([{ handle: negative, ...spec }, x], { code: 'sub' }, [spec])
    backend.free(negative)
    return sum
  }
  backend.free(run())
  const graph = backend.capture(run)
  startProfile()
  graph.replay()
  graph.replay()
  stopProfile()
  expect(graph.nodes).toBe(2)
  expect(profile().map(({ calls }) => calls)).toEqual([2, 2])
  expect(await backend.download({ handle: graph.result, ...spec })).toEqual(Float32Array.of(-2, -4))
  backend.dispose()
})

test('memory that a captured function frees is used once afterwards, and counted', async () => {
  const backend = await createBackend()
  const upload = () => backend.upload(new Float32Array(1000), [1000], 'f32') as CpuBuffer
  const outside = upload()
  for (const fn of [() => backend.free(outside), () => {}]) backend.capture(fn)
  const state = { handle: upload() }
  const replace = () => {
    backend.free(state.handle)
    state.handle = upload()
  }
  backend.capture(replace, { state: [state] }).dispose()
  expect(backend.stats()).toMatchObject({ handles: 1, bytes: 4000 })
  const [first, second] = [upload(), upload()]
  expect(second.pointer).not.toBe(first.pointer)
  backend.dispose()
})

test.each(['bf16', 'fp8', 'int8', 'int4'] as const)(
  'recorded products of the same input with %s weights are merged',
  async format => {
    const backend = await createBackend({ guarded: true })
    setDefaultBackend(backend)
    const random = new Random(3)
    const normal = (...shape: number[]) => fromHost(random.normal(shape.reduce((a, b) => a * b)), shape, 'f32')
    const weights = [70, 33, 128].map(rows => quantizeWeight(normal(rows, 160), format))
    const experts = [40, 9].map(rows => quantizeWeight(normal(3, rows, 160), format))
    const [x, other] = [normal(12, 160), normal(12, 160)]
    const offsets = fromHost(Int32Array.of(1, 2, 2, 12), [4], 'i32')
    const run = () =>
      noGrad(() => [
        ...weights.map(weight => quantizedMatmul(x, weight)),
        quantizedMatmul(other, weights[0]),
        ...experts.map(weight => quantizedGroupedMatmul(x, weight, offsets)),
      ])
    const eager = run()
    const graph = backend.capture(run)
    expect(graph.nodes).toBe(3)
    graph.replay()
    for (const [i, result] of graph.result.entries()) expect(await result.values()).toEqual(await eager[i].values())
    backend.dispose()
  },
)

test('recorded products are not merged if the second is written where the first one was', async () => {
  const backend = await createBackend({ threads: 2 })
  setDefaultBackend(backend)
  const random = new Random(3)
  const normal = (...shape: number[]) => fromHost(random.normal(shape.reduce((a, b) => a * b)), shape, 'f32')
  const weight = (rows: number) => quantizeWeight(normal(rows, 2), 'bf16')
  const x = normal(1, 2)
  for (const { unused, wanted, nodes } of [
    { unused: weight(500), wanted: weight(500), nodes: 2 },
    { unused: weight(300_000), wanted: weight(280_000), nodes: 2 },
    { unused: weight(300_000), wanted: weight(500), nodes: 1 },
  ]) {
    const run = () =>
      noGrad(() => {
        quantizedMatmul(x, unused).dispose()
        return quantizedMatmul(x, wanted)
      })
    const eager = run()
    const graph = backend.capture(run)
    expect(graph.nodes).toBe(nodes)
    graph.replay()
    const [replayed, expected] = [await graph.result.values(), await eager.values()]
    expect(replayed.every((y, i) => y === expected[i])).toBe(true)
  }
  backend.dispose()
})
