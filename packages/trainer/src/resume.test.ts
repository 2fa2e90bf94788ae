import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { readSafetensors } from '@moe/checkpoint'
import {
  disposeModule,
  Embedding,
  type InitOptions,
  type MoeError,
  type NamedParameter,
  namedParameters,
  Random,
  type Tensor,
} from '@moe/core'
import { CapacityMoE } from '@moe/router'
import { describe, expect, test, vi } from 'vitest'
import { DiskRun } from './checkpoints/disk-run.ts'
import { Muon } from './optim/muon.ts'
import { piecewise } from './optim/schedule.ts'
import type { TrainOptions } from './options.ts'
import { BigramModel, letterData, temporaryFolder } from './test-model.ts'
import { checkpointsOf, errorOf, numbersOf, run, settings, stopAfter } from './test-run.ts'
import { train } from './train.ts'

/** A model with a layer that decides at random which second experts it uses. */
class Gshard extends BigramModel {
  moe: CapacityMoE

  constructor(init: InitOptions = {}) {
    super(init)
    const config = { hidden_size: 6, moe_intermediate_size: 4, n_routed_experts: 4, router: 'gshard' } as const
    this.moe = new CapacityMoE({ ...config, capacity_factor: 4 }, { random: new Random(5), std: 1, ...init })
  }

  protected override hidden(embedded: Tensor, training: boolean): Tensor {
    const [tokens, features] = embedded.shape
    return this.moe.forward(embedded.reshape([1, tokens, features]), { training }).reshape([tokens, features])
  }

  override async afterStep(): Promise<Record<string, number>> {
    const [kept, load] = await Promise.all([this.moe.kept!.item(), this.moe.load!.values()])
    this.moe.reset()
    return { ...(await super.afterStep()), kept: kept / Array.from(load).reduce((sum, n) => sum + n, 0) }
  }
}

describe('resuming', () => {
  test.each([1, 5, 11])('after an interruption at step %i gives the same bits as never stopping', async step => {
    const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
    const uninterrupted = await run({ out: reference, accumulate: 2 })
    const first = await run({ out, accumulate: 2, ...stopAfter(step) })
    expect(first.result).toMatchObject({
      interrupted: true,
      steps: step,
      checkpoint: join(out, 'checkpoints', `step-${String(step).padStart(6, '0')}`),
    })
    expect(first.events.at(-2)).toMatchObject({ type: 'stop', reason: 'interrupted', step })
    // Means over the last tenth of the steps taken.
    const last = numbersOf(out).slice(Math.floor(0.9 * step))
    const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length
    expect(first.result.trainingLoss).toBeCloseTo(mean(last.map(({ nll }) => nll)), 10)
    expect(first.result.balance.maxVio).toBeCloseTo(mean(last.map(({ maxVio }) => maxVio)), 10)
    // With other initial weights, so that all of them must come from the checkpoint.
    const model = new BigramModel({ std: 0.1 })
    const second = await run({ out, accumulate: 2, resume: true, model })
    expect(second.result).toMatchObject({ interrupted: false, steps: 12 })
    expect(numbersOf(out)).toEqual(numbersOf(reference))
    expect(second.weights).toEqual(uninterrupted.weights)
    expect(second.result.balance).toEqual(uninterrupted.result.balance)
    expect(second.result.validation.loss).toBe(uninterrupted.result.validation.loss)
  })

  test('gives the same bits with a growing batch, and the number of tokens is known in advance', async () => {
    const accumulate = piecewise([{ steps: 10, from: 0, to: 4 }])
    const micro = [0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4]
    const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
    await expect(run({ accumulate })).rejects.toThrow(/accumulate\(0\) is 0.4/)
    const growing = { accumulate: (step: number) => Math.max(1, accumulate(step)) }
    micro[0] = 1
    const uninterrupted = await run({ out: reference, ...growing })
    const tokens = micro.map(count => count * 3 * 8)
    const sums = tokens.map((_, i) => tokens.slice(0, i + 1).reduce((sum, count) => sum + count, 0))
    expect(uninterrupted.events.flatMap(event => (event.type === 'step' ? [event.tokens] : []))).toEqual(sums)
    expect(uninterrupted.events[0]).toMatchObject({ type: 'start', tokensPerStep: 24, tokens: sums.at(-1) })
    expect(uninterrupted.result.tokens).toBe(sums.at(-1))
    await run({ out, ...growing, ...stopAfter(5) })
    const second = await run({ out, ...growing, resume: true, model: new BigramModel({ std: 0.1 }) })
    expect(second.events[0]).toMatchObject({ type: 'start', tokensPerStep: 2 * 24, tokens: sums.at(-1) })
    expect(second.weights).toEqual(uninterrupted.weights)
    await run({ out, ...growing, overwrite: true, ...stopAfter(5) })
    await expect(run({ out, accumulate: 2, resume: true })).rejects.toThrow(
      /accumulate .*: saved with a schedule \(\w+\), now 2/,
    )
  })

  test('gives the same bits with Muon, and rejects another optimizer', async () => {
    const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
    const optimizer = (parameters: readonly NamedParameter[]) =>
      new Muon(parameters, { filter: ({ name }) => name === 'lm_head.weight' })
    await run({ out: reference, optimizer })
    await run({ out, optimizer, ...stopAfter(5) })
    await run({ out, optimizer, resume: true })
    expect(numbersOf(out)).toEqual(numbersOf(reference))
    const other = await errorOf(run({ out, resume: true, optimizer: 'adamw' }))
    expect(other).toMatchObject({ code: 'E_CHECKPOINT', message: expect.stringMatching(/optimizer: saved with muon/) })
    const changed = await errorOf(run({ out, resume: true, optimizer: 'adamw', allowChanges: true }))
    expect(changed.message).toMatch(/start a new run with the model in .*step-000012.model; nothing was changed/)
  })

  test.each(['adamw', 'muon'] as const)(
    'gives the same bits with moments in bf16, which checkpoints store as bf16: %s',
    async optimizer => {
      const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
      const narrow = { optimizer, moments: 'bf16' } as const
      const uninterrupted = await run({ out: reference, ...narrow })
      await run({ out, ...narrow, ...stopAfter(5) })
      const stored = join(out, 'checkpoints', 'step-000005')
      await using file = await readSafetensors(join(stored, 'optimizer.safetensors'))
      expect(file.keys().map(name => file.info(name).dtype)).toEqual(file.keys().map(() => 'bf16'))
      expect(file.keys().length).toBeGreaterThan(2)
      const second = await run({ out, ...narrow, resume: true })
      expect(numbersOf(out)).toEqual(numbersOf(reference))
      expect(second.weights).toEqual(uninterrupted.weights)

      // To f32 and back only if changes are allowed.
      const wide = await errorOf(run({ out, optimizer, resume: stored }))
      expect((wide as MoeError).details['differences']).toEqual([
        expect.stringMatching(/^optimizer: saved with .*"moments":"bf16".*, now (?!.*moments)/),
      ])
      const other = { out, optimizer, resume: stored, allowChanges: true }
      const { result } = await run({ ...other, ...stopAfter(7) })
      expect(result.steps).toBe(7)
      const narrower = await errorOf(run({ ...narrow, out, resume: true }))
      expect(narrower.message).toMatch(/optimizer: saved with (?!.*moments.*, now).*, now .*"moments":"bf16"/)
      expect((await run({ ...narrow, out, resume: true, allowChanges: true })).result.steps).toBe(12)
    },
  )

  test('gives the same bits for a model that counts its steps, also after earlier training', async () => {
    const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
    class Scheduled extends BigramModel {
      step = 3
      override loss(...[batch, options]: Parameters<BigramModel['loss']>) {
        const output = super.loss(batch, options)
        return { ...output, loss: output.loss.mul(1 + this.step) }
      }
      override afterStep() {
        this.step++
        return super.afterStep()
      }
    }
    await run({ out: reference, model: new Scheduled() })
    await run({ out, model: new Scheduled(), ...stopAfter(5) })
    await run({ out, model: new Scheduled(), resume: true })
    expect(numbersOf(out)).toEqual(numbersOf(reference))
  })

  test('gives the same bits for a model with random numbers, whatever the state of the resuming model', async () => {
    const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
    const options = { accumulate: 2, evalEvery: 2 }
    const uninterrupted = await run({ ...options, out: reference, model: new Gshard() })
    await run({ ...options, out, model: new Gshard(), ...stopAfter(5) })
    const model = new Gshard({ random: new Random(9, 4, 7) })
    const second = await run({ ...options, out, resume: true, model })
    expect(numbersOf(out)).toEqual(numbersOf(reference))
    expect(second.weights).toEqual(uninterrupted.weights)
    const dropped = numbersOf(reference).map(({ kept }) => 1 - kept)
    expect(Math.min(...dropped)).toBeGreaterThan(0)

    const other = Object.assign(new Gshard(), { other: new Random(1) })
    const error = await errorOf(run({ ...options, out, resume: true, model: other }))
    expect((error as MoeError).details['differences']).toEqual(['streams: saved with moe.random, now moe.random other'])
  })

  test('from an earlier checkpoint drops the steps after it', async () => {
    const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: reference, checkpointEvery: 4 })
    await run({ out, checkpointEvery: 4, ...stopAfter(10) })
    await run({ out, checkpointEvery: 4, resume: join(out, 'checkpoints', 'step-000008'), keepCheckpoints: 9 })
    expect(numbersOf(out)).toEqual(numbersOf(reference))
  })

  test('from an earlier checkpoint keeps no checkpoint of the steps that it repeats', async () => {
    const out = await temporaryFolder()
    await run({ out, checkpointEvery: 4, keepCheckpoints: 9 })
    const options = { resume: join(out, 'checkpoints', 'step-000004'), keepCheckpoints: 2, allowChanges: true }
    await run({ out, checkpointEvery: 5, steps: 15, ...options })
    const kept = await readdir(join(out, 'checkpoints'))
    expect(kept.sort()).toEqual(['latest', 'step-000010', 'step-000015'])
  })

  test('from the checkpoint of another folder starts a separate run', async () => {
    const [from, out] = [await temporaryFolder(), join(await temporaryFolder(), 'branch')]
    const first = await run({ out: from, ...stopAfter(4) })
    const before = numbersOf(from)
    const { result } = await run({ out, resume: first.result.checkpoint, lr: 0.01, allowChanges: true })
    expect(result.steps).toBe(12)
    expect(numbersOf(out).map(({ step }) => step)).toEqual([5, 6, 7, 8, 9, 10, 11, 12])
    expect(numbersOf(from)).toEqual(before)
  })

  test('rejects a second training into a folder in use, and the first continues', async () => {
    const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: reference })
    let second: Promise<Error> | undefined
    const onEvent: TrainOptions['onEvent'] = event => {
      if (event.type === 'start') second = errorOf(run({ out, overwrite: true }))
    }
    await run({ out, onEvent })
    expect(await second).toMatchObject({ code: 'E_CONFIG', message: expect.stringMatching(/is writing to/) })
    expect(numbersOf(out)).toEqual(numbersOf(reference))
  })

  test('with another batch size takes the rows that follow, and with rows of another length starts at their beginning', async () => {
    const out = await temporaryFolder()
    /** Starts of the rows that the steps of a run read, and its events. */
    const read = async (options: Partial<TrainOptions>) => {
      const { training, validation } = letterData()
      const rows: number[] = []
      const own = training.read.bind(training)
      training.read = (from, count) => {
        rows.push(from)
        return own(from, count)
      }
      const { events } = await run({ ...options, data: { training, validation } })
      return { rows, start: events[0] }
    }
    const resumed = { out, resume: true, allowChanges: true } as const
    const { rows: order } = await read({ steps: 10 })
    expect(new Set(order).size).toBe(30)
    const first = await read({ out, steps: 4 })
    const second = await read({ ...resumed, steps: 6, batchSize: 6 })
    const third = await read({ ...resumed, steps: 7, batchSize: 6 })
    expect([...first.rows, ...second.rows, ...third.rows]).toEqual(order)
    expect(third.start).toMatchObject({ type: 'start', epochs: 30 / 130 })
    const long = { steps: 9, sequenceLength: 16 }
    const { rows: longRows } = await read({ ...long, steps: 2 })
    const fourth = await read({ ...resumed, ...long })
    expect(fourth.rows).toEqual(longRows)
    expect(fourth.start).toMatchObject({ type: 'start', epochs: 6 / 65 })
  })

  test('a run that another process saved just before the folder was locked is not removed', async () => {
    const out = await temporaryFolder()
    await run({ out, ...stopAfter(4) })
    const latest = vi.spyOn(DiskRun.prototype, 'latest').mockResolvedValueOnce(undefined)
    expect(await errorOf(run({ out }))).toMatchObject({ code: 'E_CONFIG', message: expect.stringMatching(/already/) })
    latest.mockResolvedValueOnce(undefined)
    const { events } = await run({ out, resume: 'auto' })
    expect(events[0]).toMatchObject({ type: 'start', fromStep: 4 })
    latest.mockRestore()
  })

  test("'auto' starts a new run in an empty folder, and resumes an existing one", async () => {
    const out = await temporaryFolder()
    const first = await run({ out, resume: 'auto', ...stopAfter(3) })
    expect(first.events[0]).toMatchObject({ type: 'start', fromStep: 0 })
    const second = await run({ out, resume: 'auto' })
    expect(second.events[0]).toMatchObject({ type: 'start', fromStep: 3, fromTokens: first.result.tokens })
    const third = await run({ out, resume: 'auto' })
    expect([...new Set(third.events.map(({ type }) => type))]).toEqual(['start', 'evaluating', 'evaluation', 'end'])
  })

  test('a finished run evaluates again, and its summary stays complete', async () => {
    const out = await temporaryFolder()
    const read = async () => JSON.parse(await readFile(join(out, 'summary.json'), 'utf8'))
    await run({ out })
    const before = await read()
    expect(Object.keys(before.balance)).toEqual(['maxVio', 'batches'])
    await run({ out, resume: true })
    const evaluation = { validation: expect.objectContaining({ loss: before.validation.loss }) }
    const peaks = { peakMemoryBytes: expect.any(Number), peakDeviceBytes: expect.any(Number) }
    expect(await read()).toEqual({ ...before, ...evaluation, ...peaks })
  })

  test('reports the peak memory of the process with the highest peak', async () => {
    const out = await temporaryFolder()
    const first = await run({ out, ...stopAfter(3) })
    const file = join(first.result.checkpoint ?? '', 'trainer.json')
    const state = JSON.parse(await readFile(file, 'utf8'))
    const { peakMemoryBytes, peakDeviceBytes } = first.result
    expect(state.peakDeviceBytes).toBe(peakDeviceBytes)
    expect(state.peakMemoryBytes).toBeLessThanOrEqual(peakMemoryBytes)
    expect(state.peakMemoryBytes).toBeGreaterThan(1e7)
    // As if an earlier process with another backend had used more.
    await writeFile(file, JSON.stringify({ ...state, peakMemoryBytes: 2 ** 50, peakDeviceBytes: 1 }))
    const second = await run({ out, checkpointEvery: 5, ...stopAfter(6), resume: true })
    expect(second.result).toMatchObject({ peakMemoryBytes: 2 ** 50, peakDeviceBytes })
    const third = await run({ out, resume: true })
    expect(third.result).toMatchObject({ peakMemoryBytes: 2 ** 50, peakDeviceBytes })
    expect(JSON.parse(await readFile(join(out, 'summary.json'), 'utf8')).peakMemoryBytes).toBe(2 ** 50)
  })

  test('rejects a finished run without resume or overwrite', async () => {
    const out = await temporaryFolder()
    await run({ out })
    const before = numbersOf(out)
    expect(await errorOf(run({ out }))).toMatchObject({
      code: 'E_CONFIG',
      message: expect.stringMatching(/resume: true.*overwrite: true/),
    })
    expect(numbersOf(out)).toEqual(before)
    await run({ out, steps: 2, overwrite: true })
    expect(numbersOf(out)).toHaveLength(2)
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000002'])
  })

  test('ignores a partial line and a partial checkpoint after a crash', async () => {
    const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: reference })
    await run({ out, ...stopAfter(6) })
    const metrics = join(out, 'metrics.jsonl')
    await writeFile(metrics, `${await readFile(metrics, 'utf8')}{"step":7,"loss":1.5,"nll":1.5}\n{"step":8,"lo`)
    await mkdir(join(out, 'checkpoints', '.writing-step-000008-1-0', 'model'), { recursive: true })
    await writeFile(join(out, 'checkpoints', 'latest'), 'step-000008\n')
    await run({ out, resume: true })
    expect(numbersOf(out)).toEqual(numbersOf(reference))
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000006', 'step-000012'])
  })
})

describe('an error, after which nothing has changed, for', () => {
  async function interruptedRun(): Promise<{ out: string; path: string }> {
    const out = await temporaryFolder()
    const { result } = await run({ out, ...stopAfter(4) })
    return { out, path: result.checkpoint ?? '' }
  }

  async function errorOfResuming(out: string, options: Partial<TrainOptions> = {}) {
    const model = new BigramModel()
    const before = await Promise.all(namedParameters(model).map(({ parameter }) => parameter.values()))
    const metrics = numbersOf(out)
    const error = await errorOf(train(model, { ...settings, out, resume: true, ...options }))
    const after = await Promise.all(namedParameters(model).map(({ parameter }) => parameter.values()))
    expect(after).toEqual(before)
    expect(numbersOf(out)).toEqual(metrics)
    disposeModule(model)
    return error
  }

  test.each(['model/model.safetensors', 'optimizer.safetensors', 'trainer.json'])('a truncated %s', async file => {
    const { out, path } = await interruptedRun()
    const bytes = await readFile(join(path, file))
    await writeFile(join(path, file), bytes.subarray(0, bytes.length - 5))
    const error = await errorOfResuming(out)
    expect(error).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringContaining(file.split('/').at(-1) ?? ''),
    })
  })

  test.each(['model/model.safetensors', 'optimizer.safetensors', 'trainer.json', 'model'])(
    'a corrupt %s, which names the latest intact checkpoint',
    async file => {
      const out = await temporaryFolder()
      await run({ out, checkpointEvery: 2, keepCheckpoints: 9, ...stopAfter(8) })
      const at = (step: number) => join(out, 'checkpoints', `step-00000${step}`)
      const truncate = async (path: string) => writeFile(path, (await readFile(path)).subarray(0, 100))
      for (const step of [6, 8]) {
        if (file === 'model') await rm(join(at(step), file), { recursive: true })
        else await truncate(join(at(step), file))
      }
      const error = await errorOfResuming(out)
      expect(error).toMatchObject({ code: 'E_CHECKPOINT', details: { whole: at(4) } })
      expect(error.message).toContain(`${at(4)} is intact`)
      await run({ out, resume: at(4), checkpointEvery: 99 })
    },
  )

  test.each(['model/model.safetensors', 'optimizer.safetensors'])('an empty %s', async file => {
    const { out, path } = await interruptedRun()
    await writeFile(join(path, file), '')
    expect(await errorOfResuming(out)).toMatchObject({ code: 'E_CHECKPOINT' })
  })

  test('a folder that is not a checkpoint', async () => {
    const { out } = await interruptedRun()
    expect(await errorOfResuming(out, { resume: out })).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/not a checkpoint of a training run/),
    })
    expect(await errorOfResuming(out, { resume: join(out, 'nothing') })).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/no such folder; the latest checkpoint of the run is .*step-\d+$/),
    })
  })

  test('a trainer.json of another program', async () => {
    const { out, path } = await interruptedRun()
    await writeFile(join(path, 'trainer.json'), '{"global_step": 4}')
    expect(await errorOfResuming(out)).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/not a trainer state of this format/),
    })
  })

  test.each([
    ['step', 2.5],
    ['balance', { a: 1 }],
    ['peakMemoryBytes', -1],
    ['streams', null],
    ['streams', { 'moe.random': { seed: 1, stream: 2 } }],
  ])('a trainer.json whose %s is %j', async (field, value) => {
    const { out, path } = await interruptedRun()
    const file = join(path, 'trainer.json')
    await writeFile(file, JSON.stringify({ ...JSON.parse(await readFile(file, 'utf8')), [field]: value }))
    expect(await errorOfResuming(out)).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringContaining(`has invalid ${field} ${JSON.stringify(value)}`),
    })
  })

  test('other settings, of which it lists all, unless changes are allowed', async () => {
    const { out } = await interruptedRun()
    const changed = { lr: 0.01, seed: 8, data: letterData(19) }
    const error = await errorOfResuming(out, changed)
    expect(error).toMatchObject({ code: 'E_CHECKPOINT' })
    for (const text of ['seed: saved with 7, now 8', 'lr: saved with 0.05, now 0.01', 'data: ', 'allowChanges']) {
      expect(error.message).toContain(text)
    }
    const longer = await errorOfResuming(out, { steps: 20 })
    expect((longer as MoeError).details['differences']).toEqual(['steps: saved with 12, now 20'])
    const { result } = await run({ out, resume: true, allowChanges: true, ...changed })
    expect(result.steps).toBe(12)
  })

  test('a model with other settings of the same shapes', async () => {
    const out = await temporaryFolder()
    const model = (chosen: number, last: number) => {
      const weight = (step: number) => (step < 11 ? 1 : last)
      return Object.assign(new BigramModel(), {
        settings: { chosen, scale: [1, 2], weight, other: () => ({}), of: (x: string) => x.at(0) },
      })
    }
    await run({ out, model: model(2, 3), ...stopAfter(4) })
    const error = await errorOf(run({ out, model: model(3, 4), resume: true }))
    expect(error).toMatchObject({ code: 'E_CHECKPOINT' })
    expect((error as MoeError).details['differences']).toEqual([
      'model.chosen: saved with 2, now 3',
      expect.stringMatching(/^model\.weight: saved with a schedule \(\w+\), now a schedule \(\w+\)$/),
    ])
    await run({ out, model: model(2, 3), resume: true })
  })

  test('a folder without checkpoints', async () => {
    expect(await errorOfResuming(await temporaryFolder())).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/no checkpoint/),
    })
  })

  test('a model with other parameters, and an optimizer.safetensors of another program', async () => {
    const { out, path } = await interruptedRun()
    class Wider extends BigramModel {
      extra = new Embedding(3, 2)
    }
    const model = new Wider()
    const error = await errorOf(train(model, { ...settings, out, resume: true }))
    expect(error).toMatchObject({ code: 'E_CHECKPOINT', message: expect.stringMatching(/parameters: saved with 3 of/) })
    disposeModule(model)
    await writeFile(join(path, 'optimizer.safetensors'), await readFile(join(path, 'model', 'model.safetensors')))
    expect(await errorOfResuming(out)).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/unnamed optimizer/),
    })
  })
})
