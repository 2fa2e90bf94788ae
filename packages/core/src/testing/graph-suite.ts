/** @file The checks of a backend that captures graphs (`Backend.capture`). */
import { backward } from '../autograd/backward.ts'
import type { Backend } from '../backend.ts'
import { full, randn, tensor } from '../create.ts'
import { isMoeError } from '../errors.ts'
import { adamwStep } from '../fused/adamw.ts'
import { emaStep } from '../fused/ema.ts'
import { Linear } from '../nn/layers.ts'
import { Parameter } from '../parameter.ts'
import { setRows } from '../primitives.ts'
import { Random } from '../random.ts'
import { scope } from '../scope.ts'
import type { Tensor } from '../tensor.ts'
import { checkPrograms, compareValues, programCount, readResult } from './random-programs/check-program.ts'
import { ProgramRun } from './random-programs/program.ts'
import type { SuiteCheck } from './suite.ts'

/** A backend that captures graphs. */
export type Recorder = Backend & Required<Pick<Backend, 'capture' | 'write'>>

/**
 * Returns the checks of a backend with `capture`. `make` is called once or twice per check, and each backend is
 * disposed.
 */
export function graphSuite(make: () => Promise<Recorder>): SuiteCheck[] {
  const checks: Record<string, (backend: Recorder) => Promise<void>> = {
    'inputs are written in place, and ops between replays do not interfere': checkInputs,
    'a replayed setRows updates a donated tensor, as in a cache': checkDonated,
    'state may move to other state': checkMoved,
    'reading during capture is rejected, and the backend works afterwards': checkRefusals,
    'a disposed graph frees its memory': checkMemory,
    'a failed capture leaves the state unchanged': checkFailure,
    'results outlive their graph, and are freed once': checkResult,
    'replayed random programs equal the eager ones bit for bit': checkRandom,
  }
  return [
    {
      name: 'graphs: a replayed training step equals the eager one bit for bit, with changing learning rates',
      run: async () => expectSame(await train(await make(), true), await train(await make(), false)),
    },
    ...Object.entries(checks).map(([name, check]) => ({
      name: `graphs: ${name}`,
      run: async () => {
        const backend = await make()
        try {
          await check(backend)
        } finally {
          backend.dispose()
        }
      },
    })),
  ]
}

function expectSame(actual: unknown, expected: unknown): void {
  // In JSON, NaN and infinities would be the same.
  const text = (value: unknown) => JSON.stringify(value, (_, part) => (typeof part === 'number' ? String(part) : part))
  const [a, b] = [text(actual), text(expected)]
  if (a !== b) throw new Error(`got ${a}, expected ${b}`)
}

const attrs = { lr: 0.05, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.01, step: 1 }

/** Creates a model, its optimizer and a training step, as a user would write it. */
function trainer(backend: Backend) {
  const model = new Linear(8, 4, { random: new Random(3), backend })
  const x = randn([16, 8], new Random(4), { backend })
  const y = randn([16, 4], new Random(5), { backend })
  const m = new Parameter(full([4, 8], 0, { backend }))
  const v = new Parameter(full([4, 8], 0, { backend }))
  /** A statistic that every step replaces: state that is not donated. */
  const average = new Parameter(full([], 0, { backend }))
  const ema = new Parameter(full([4, 8], 0, { backend }))
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
      ema.assign(emaStep(ema, model.weight, { decay: 0.9, step: now.step }))
      model.weight.zeroGrad()
      average.assign(average.mul(0.5).add(loss.detach().mul(0.5)))
      return loss.detach()
    })
  return { model, average, ema, step }
}

/**
 * Returns the losses and the final state of four steps: the first one eager, the others eager or replayed from a graph.
 */
async function train(backend: Recorder, graphed: boolean) {
  const { model, average, ema, step } = trainer(backend)
  const losses = [await step(attrs).item()]
  const graph = graphed
    ? backend.capture(() => step({ ...attrs, step: 2 }), { state: [average, model.weight] })
    : undefined
  for (let t = 2; t <= 4; t++) {
    const lr = attrs.lr / t
    graph?.replay({ adamwStep: now => ({ ...now, lr, step: t }), emaStep: now => ({ ...now, step: t }) })
    losses.push(await (graph?.result ?? step({ ...attrs, lr, step: t })).item())
  }
  const values = async (tensor: Tensor) => [...(await tensor.values())]
  const state = { losses, weight: await values(model.weight), ema: await values(ema), average: await average.item() }
  backend.dispose()
  return state
}

async function rounded(x: Tensor): Promise<number[]> {
  return [...(await x.values())].map(Math.round)
}

async function checkInputs(backend: Recorder): Promise<void> {
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
    results.push(await rounded(graph.result))
  }
  expectSame(results, [
    [12, 24, 36, 48],
    [20, 32, 44, 56],
  ])
  graph.dispose()
  expectSame(await rounded(graph.result), results[1])
  await expectError(() => graph.replay())
  await expectError(() => backend.write(x, Float32Array.of(1)))
}

async function checkDonated(backend: Recorder): Promise<void> {
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
  expectSame([...(await cache.values())], [0, 0, 1, 2, 0, 0, 1, 2])
  graph.dispose()
}

async function checkMoved(backend: Recorder): Promise<void> {
  const results: number[][] = []
  for (const replayed of [true, false]) {
    const state = [1, 2, 3, 4].map(value => new Parameter(full([3], value, { backend })))
    const [a, b, last, first] = state
    const step = () =>
      scope(() => {
        a.swap(b)
        last.assign(first.detach())
        first.assign(first.add(a))
      })
    step()
    const { handles } = backend.stats()
    const graph = replayed ? backend.capture(step, { state: [...state, a] }) : undefined
    expectSame(backend.stats().handles, handles)
    for (let i = 0; i < 3; i++) replayed ? graph?.replay() : step()
    for (const t of state) results.push([...(await t.values())])
    graph?.dispose()
    for (const t of state) t.dispose()
  }
  expectSame(results.slice(0, 4), results.slice(4))
}

async function checkRefusals(backend: Recorder): Promise<void> {
  const x = tensor([1, 2], [2], { backend })
  const reads: Array<Promise<unknown>> = []
  const graph = backend.capture(() => {
    reads.push(expectError(() => x.values()))
    return x.neg()
  })
  await reads[0]
  await expectError(() => backend.capture(async () => {}))
  const mine = new Error('mine')
  await expectError(
    () =>
      backend.capture(() => {
        throw mine
      }),
    error => error === mine,
  )
  expectSame([...(await x.neg().values())], [-1, -2])
  graph.dispose()
}

async function expectError(fn: () => unknown, expected: (error: unknown) => boolean = isMoeError): Promise<void> {
  try {
    await fn()
  } catch (error) {
    if (expected(error)) return
    throw error
  }
  throw new Error('expected an error')
}

async function checkMemory(backend: Recorder): Promise<void> {
  const x = tensor([1, 2], [2], { backend })
  const { handles } = backend.stats()
  const graph = backend.capture(() => scope(() => x.exp().add(tensor([1, 1], [2], { backend }))))
  graph.replay()
  expectSame((await graph.result.values()).length, 2)
  graph.result.dispose()
  graph.dispose()
  expectSame(backend.stats().handles, handles)
}

async function checkResult(backend: Recorder): Promise<void> {
  const x = tensor([1, 2], [2], { backend })
  x.neg().dispose()
  const graph = backend.capture(() => x.neg())
  graph.replay()
  graph.dispose()
  const others = Array.from({ length: 8 }, (_, i) => full([2], i, { backend }))
  expectSame([...(await graph.result.values())], [-1, -2])
  graph.result.dispose()
  for (const other of others) other.dispose()
}

async function checkRandom(backend: Recorder): Promise<void> {
  await checkPrograms(programCount(), async program => {
    const { handles } = backend.stats()
    const run = new ProgramRun(program, backend)
    const eager = await readResult(run.step())
    const graph = backend.capture(() => run.step())
    for (let replay = 0; replay < 2; replay++) graph.replay()
    graph.dispose()
    compareValues(await readResult(graph.result), eager)
    run.dispose()
    expectSame(backend.stats().handles, handles)
  })
}

async function checkFailure(backend: Recorder): Promise<void> {
  const x = new Parameter(full([4], 3, { backend }))
  const { handle } = x
  const { handles } = backend.stats()
  const assigns = () => x.assign(x.mul(2))
  // As backward does with accumulated gradients.
  const frees = () => x.dispose()
  for (const change of [assigns, frees]) {
    const fail = () =>
      scope(() => {
        change()
        throw new Error('no')
      })
    await expectError(
      () => backend.capture(fail, { state: [x] }),
      error => (error as Error).message === 'no',
    )
    expectSame([x.handle === handle, backend.stats().handles], [true, handles])
  }
  const other = full([4], 7, { backend })
  expectSame([...(await x.values())], [3, 3, 3, 3])
  for (const tensor of [x, other]) tensor.dispose()
}
