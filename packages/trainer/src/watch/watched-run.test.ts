import { spawnSync } from 'node:child_process'
import { appendFile, rename, rm, writeFile } from 'node:fs/promises'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import { afterEach, describe, expect, test } from 'vitest'
import { BigramModel, letterData, removeTemporaryFolders, roundingBackend, temporaryFolder } from '../test-model.ts'
import { train } from '../train.ts'
import { WatchedRun } from './watched-run.ts'

afterEach(removeTemporaryFolders)

const jsonl = (lines: readonly unknown[]) => lines.map(line => `${JSON.stringify(line)}\n`).join('')

const metrics = (from: number, to: number, nll = 2) =>
  jsonl(
    Array.from({ length: to - from + 1 }, (_, i) => {
      return { step: from + i, nll, tokens: 8 * (from + i), tokensPerSecond: 100 }
    }),
  )

const start = { type: 'start', time: '2026-01-01T00:00:00.000Z', backend: 'reference', steps: 10, tokensPerStep: 8 }

async function watched() {
  const folder = await temporaryFolder()
  const run = new WatchedRun('a run', folder)
  const write = (name: string, text: string) => appendFile(join(folder, name), text)
  const state = async () => {
    while (await run.refresh());
    return run.state
  }
  const nll = () => run.series.patch().columns.find(({ name }) => name === 'nll')?.mean
  return { folder, run, write, state, nll }
}

test('shows a training while it runs and when it is finished', async () => {
  const { folder, run, state } = await watched()
  const seen: unknown[] = []
  class Watching extends BigramModel {
    override async afterStep() {
      const { status, steps } = await state()
      seen.push([status, steps])
      return super.afterStep()
    }
  }
  const result = await train(new Watching({ backend: roundingBackend() }), {
    data: letterData(),
    steps: 6,
    batchSize: 2,
    sequenceLength: 8,
    evalEvery: 3,
    lr: 0.01,
    out: folder,
    progress: false,
  })
  expect(seen).toEqual(Array.from({ length: 6 }, () => ['training', 6]))
  const done = await state()
  expect(done).toMatchObject({
    name: 'a run',
    status: 'finished',
    step: 6,
    steps: 6,
    secondsLeft: null,
    about: { backend: 'reference' },
    settings: { lr: 0.01, batchSize: 2 },
    problem: null,
    badLines: 0,
  })
  expect(done.validation.map(({ step, final }) => [step, final])).toEqual([
    [3, false],
    [6, true],
  ])
  expect(done.validation[1].bitsPerByte).toBe(result.validation.bitsPerByte)
  expect(run.series.patch().steps).toEqual([1, 2, 3, 4, 5, 6])
})

describe('log lines', () => {
  test('are skipped and counted if they are invalid', async () => {
    const { write, state, nll } = await watched()
    const steps = ['', '"2"', '-1', '1.5', '1e999', 'null'].map(step => `{"step":${step}}`)
    const bad = ['{"step":', 'null', '[1]', '{"nll":1}', ...steps]
    await write('metrics.jsonl', `${metrics(1, 1)}${bad.join('\n')}\n${metrics(2, 2)}`)
    await write('events.jsonl', `${jsonl([start])}oops\n{"type":7}\n[]\n{"type":"evaluation","step":null}\n`)
    expect(await state()).toMatchObject({ step: 2, steps: 10, badLines: bad.length, validation: [] })
    expect(nll()).toEqual([2, 2])
  })

  test('are not invalid while they are incomplete', async () => {
    const { write, state, nll } = await watched()
    const text = metrics(1, 2)
    await write('metrics.jsonl', text.slice(0, -10))
    expect(await state()).toMatchObject({ step: 1, badLines: 0 })
    await write('metrics.jsonl', text.slice(-10))
    expect(await state()).toMatchObject({ step: 2, badLines: 0 })
    expect(nll()).toEqual([2, 2])
  })
})

test.each(['reward', 'preferred'])('shows %s of held-out data', async name => {
  const { write, state } = await watched()
  const evaluation = { step: 4, loss: 1, bitsPerByte: null, [name]: 0.5, final: false }
  await write('events.jsonl', jsonl([start, { type: 'evaluation', ...evaluation }]))
  expect((await state()).validation).toEqual([evaluation])
})

test('shows the evaluations of the weights and of their EMA', async () => {
  const { write, state } = await watched()
  const evaluation = { step: 4, loss: 1, bitsPerByte: 2, final: false, ema: { loss: 0.5, bitsPerByte: 1 } }
  const logged = { ...evaluation, ema: { ...evaluation.ema, tokens: 9, seconds: 1 } }
  await write('events.jsonl', jsonl([start, { type: 'evaluation', ...logged }]))
  expect((await state()).validation).toEqual([evaluation])
})

describe('a resumed run', () => {
  const evaluation = (step: number, loss: number) => ({ type: 'evaluation', step, loss, bitsPerByte: 1, final: false })

  test('shows the later lines of repeated steps if the log was truncated', async () => {
    const { folder, write, state, nll } = await watched()
    await write('metrics.jsonl', metrics(1, 6))
    await state()
    // `train` truncates the log like this.
    await writeFile(join(folder, 'metrics.tmp'), metrics(1, 4))
    await rename(join(folder, 'metrics.tmp'), join(folder, 'metrics.jsonl'))
    await write('metrics.jsonl', metrics(5, 7, 1))
    expect(await state()).toMatchObject({ step: 7 })
    expect(nll()).toEqual([2, 2, 2, 2, 1, 1, 1])
  })

  test('shows the later lines of repeated steps if the log was not truncated', async () => {
    const { write, state, nll } = await watched()
    await write('metrics.jsonl', metrics(1, 6))
    await state()
    await write('metrics.jsonl', metrics(5, 5, 1))
    expect(await state()).toMatchObject({ step: 5 })
    expect(nll()).toEqual([2, 2, 2, 2, 1])
  })

  test('drops evaluations after its first step, and the earlier failure', async () => {
    const { write, state } = await watched()
    await write('events.jsonl', jsonl([start, evaluation(3, 3), evaluation(6, 2)]))
    await write('events.jsonl', jsonl([{ type: 'fail', error: { code: 'E_NAN', message: 'not finite' } }]))
    expect(await state()).toMatchObject({ status: 'failed', problem: 'not finite' })
    await write('events.jsonl', jsonl([{ ...start, fromStep: 4 }]))
    expect(await state()).toMatchObject({ validation: [{ loss: 3 }] })
    await write('events.jsonl', jsonl([evaluation(6, 1)]))
    expect(await state()).toMatchObject({ problem: null, validation: [{ loss: 3 }, { loss: 1 }] })
  })
})

test('shows curves of logged values, and of each source of held-out data', async () => {
  const { write, state } = await watched()
  const log = (step: number, values: unknown) => ({ type: 'log', step, values })
  const sources = { web: { loss: 3, bitsPerByte: 1.5, tokens: 9 }, code: { loss: 2, bitsPerByte: null }, odd: 1 }
  await write(
    'events.jsonl',
    jsonl([
      start,
      log(2, { 'lambada/acc': 0.25, odd: 'text', missing: null }),
      { type: 'evaluation', step: 3, loss: 2.5, bitsPerByte: null, final: false, sources },
      log(4, { 'lambada/acc': 0.5 }),
      log(-1, { bad: 1 }),
      log(4, 7),
    ]),
  )
  const curves = {
    'lambada/acc': { steps: [2, 4], values: [0.25, 0.5] },
    'validation/web/loss': { steps: [3], values: [3] },
    'validation/web/bitsPerByte': { steps: [3], values: [1.5] },
    'validation/code/loss': { steps: [3], values: [2] },
  }
  expect((await state()).logged).toEqual(curves)

  await write('events.jsonl', jsonl([{ ...start, fromStep: 3 }]))
  expect((await state()).logged).toEqual({ ...curves, 'lambada/acc': { steps: [2], values: [0.25] } })
  const many = Object.fromEntries(Array.from({ length: 100 }, (_, i) => [`n${i}`, i]))
  await write('events.jsonl', jsonl(Array.from({ length: 2000 }, (_, i) => log(i + 4, many))))
  const { logged } = await state()
  expect(Object.keys(logged)).toHaveLength(64)
  expect(Math.max(...Object.values(logged).map(({ steps }) => steps.length))).toBeLessThanOrEqual(500)
})

test('shows an empty run after its files are removed', async () => {
  const { folder, write, state, run } = await watched()
  await write('metrics.jsonl', metrics(1, 3))
  await write('events.jsonl', jsonl([start, { type: 'notice', message: 'look' }]))
  expect(await state()).toMatchObject({ step: 3, notices: ['look'] })
  await rm(join(folder, 'metrics.jsonl'))
  await rm(join(folder, 'events.jsonl'))
  expect(await state()).toMatchObject({ step: 0, steps: null, notices: [], status: 'unknown', changed: 0 })
  expect(run.series.patch()).toMatchObject({ steps: [], columns: [] })
})

describe('status', () => {
  const end = (stopped?: string) => ({ type: 'end', result: { stopped } })
  const dead = spawnSync(process.execPath, ['-e', '']).pid

  test.each([
    ['training', 'the process runs', [start], `${process.ppid} ${hostname()}`],
    ['killed', 'the process is gone', [start], `${dead} ${hostname()}`],
    ['killed', 'there is no lock', [start], undefined],
    ['training', 'another machine has the lock', [start], '1 elsewhere.example'],
    ['finished', 'it ended', [start, end()], undefined],
    ['interrupted', 'it was interrupted', [start, end('interrupted')], undefined],
    ['time', 'it reached its time limit', [start, end('time')], undefined],
    ['failed', 'it failed', [start, { type: 'fail', error: { message: 'no' } }], undefined],
    ['finished', 'it ended for an unknown reason', [start, end('who knows')], undefined],
    ['unknown', 'there are no events', [], undefined],
  ])('is %s if %s', async (status, _, events, lock) => {
    const { write, state } = await watched()
    await write('metrics.jsonl', metrics(1, 4))
    if (events.length > 0) await write('events.jsonl', jsonl(events))
    if (lock !== undefined) await write('training.lock', `${lock}\n`)
    expect(await state()).toMatchObject({ status, secondsLeft: status === 'training' && lock ? 0.48 : null })
  })

  test('has evaluations over the whole run, and the latest one, however many there are', async () => {
    const { write, state } = await watched()
    const evaluations = Array.from({ length: 5000 }, (_, i) => ({ type: 'evaluation', step: 10 * (i + 1), loss: 2 }))
    await write('events.jsonl', jsonl([start, ...evaluations, { ...evaluations[4999], loss: 1, final: true }]))
    const { validation } = await state()
    expect(validation.length).toBeLessThanOrEqual(2000)
    expect(validation.at(-1)).toMatchObject({ step: 50_000, loss: 1, final: true })
    const steps = [0, ...validation.map(({ step }) => step)]
    for (let i = 1; i < steps.length; i++) expect(steps[i] - steps[i - 1]).toBeLessThanOrEqual(80)
  })

  test('is read from the summary of a run without events', async () => {
    const { write, state } = await watched()
    await write('metrics.jsonl', metrics(1, 4))
    await write(
      'summary.json',
      JSON.stringify({ steps: 4, backend: 'kernels-cpu', validation: { bitsPerByte: 1.5 }, ema: { loss: 1 } }),
    )
    expect(await state()).toMatchObject({
      status: 'finished',
      steps: 4,
      about: { backend: 'kernels-cpu' },
      validation: [{ step: 4, loss: null, bitsPerByte: 1.5, final: true, ema: { loss: 1, bitsPerByte: null } }],
    })
  })
})

test('a million lines are read with a heap of 24 MB, and reduced to 2000 points', async () => {
  const { folder, write } = await watched()
  const count = 1_000_000
  for (let at = 0; at < count; at += 50_000) {
    const lines = Array.from({ length: 50_000 }, (_, i) => `{"step":${at + i + 1},"nll":${i % 7},"lr":1,"a":2,"b":3}\n`)
    await write('metrics.jsonl', lines.join(''))
  }
  // The values of all lines would take 32 MB, and as objects several times as much.
  const program = `
    import(${JSON.stringify(new URL('watched-run.ts', import.meta.url).href)}).then(async ({ WatchedRun }) => {
      const run = new WatchedRun('long', ${JSON.stringify(folder)})
      while (await run.refresh());
      require('node:worker_threads').parentPort.postMessage({ step: run.state.step, patch: run.series.patch() })
    })`
  const worker = new Worker(program, { eval: true, resourceLimits: { maxOldGenerationSizeMb: 24 } })
  const { step, patch } = await new Promise<{ step: number; patch: ReturnType<WatchedRun['series']['patch']> }>(
    (done, failed) => worker.once('message', done).once('error', failed),
  )
  expect(step).toBe(count)
  expect(patch.steps.length).toBeLessThanOrEqual(2000)
  expect([patch.steps[0], patch.steps[patch.steps.length - 1]]).toEqual([1, count])
})
