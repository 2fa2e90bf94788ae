import { mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { readSafetensors } from '@moe/checkpoint'
import {
  disposeModule,
  type InitOptions,
  type MoeError,
  type NamedParameter,
  namedParameters,
  Random,
  type Tensor,
} from '@moe/core'
import { CapacityMoE } from '@moe/router'
import { describe, expect, test } from 'vitest'
import { Muon } from './optim/muon.ts'
import { piecewise } from './optim/schedule.ts'
import type { TrainOptions } from './options.ts'
import { BigramModel, letterData, temporaryFolder } from './test-model.ts'
import { checkpointsOf, errorOf, numbersOf, run, settings, stopAfter } from './test-run.ts'
import { train } from './train.ts'

/** With a layer that draws which second choices it uses. */
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
    const [whole, cut] = [await temporaryFolder(), await temporaryFolder()]
    const straight = await run({ out: whole, accumulate: 2 })
    const first = await run({ out: cut, accumulate: 2, ...stopAfter(step) })
    expect(first.result).toMatchObject({
      interrupted: true,
      steps: step,
      checkpoint: join(cut, 'checkpoints', `step-${String(step).padStart(6, '0')}`),
    })
    expect(first.events.at(-2)).toMatchObject({ type: 'stop', reason: 'interrupted', step })
    // Of what was done.
    const last = numbersOf(cut).slice(Math.floor(0.9 * step))
    const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length
    expect(first.result.trainingLoss).toBeCloseTo(mean(last.map(({ nll }) => nll)), 10)
    expect(first.result.balance.maxVio).toBeCloseTo(mean(last.map(({ maxVio }) => maxVio)), 10)
    // Other initial weights: all must come from the checkpoint.
    const model = new BigramModel({ std: 0.1 })
    const second = await run({ out: cut, accumulate: 2, resume: true, model })
    expect(second.result).toMatchObject({ interrupted: false, steps: 12 })
    expect(numbersOf(cut)).toEqual(numbersOf(whole))
    expect(second.weights).toEqual(straight.weights)
    expect(second.result.balance).toEqual(straight.result.balance)
    expect(second.result.validation.loss).toBe(straight.result.validation.loss)
  })

  test('holds for a growing batch, whose tokens are counted in advance', async () => {
    const accumulate = piecewise([{ steps: 10, from: 0, to: 4 }])
    const micro = [0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4]
    const [whole, cut] = [await temporaryFolder(), await temporaryFolder()]
    await expect(run({ accumulate })).rejects.toThrow(/accumulate\(0\) is 0.4/)
    const growing = { accumulate: (step: number) => Math.max(1, accumulate(step)) }
    micro[0] = 1
    const straight = await run({ out: whole, ...growing })
    const tokens = micro.map(count => count * 3 * 8)
    const sums = tokens.map((_, i) => tokens.slice(0, i + 1).reduce((sum, count) => sum + count, 0))
    expect(straight.events.flatMap(event => (event.type === 'step' ? [event.tokens] : []))).toEqual(sums)
    expect(straight.events[0]).toMatchObject({ type: 'start', tokensPerStep: 24, tokens: sums.at(-1) })
    expect(straight.result.tokens).toBe(sums.at(-1))
    await run({ out: cut, ...growing, ...stopAfter(5) })
    const second = await run({ out: cut, ...growing, resume: true, model: new BigramModel({ std: 0.1 }) })
    expect(second.events[0]).toMatchObject({ type: 'start', tokensPerStep: 2 * 24, tokens: sums.at(-1) })
    expect(second.weights).toEqual(straight.weights)
    await run({ out: cut, ...growing, overwrite: true, ...stopAfter(5) })
    await expect(run({ out: cut, accumulate: 2, resume: true })).rejects.toThrow(
      /accumulate .*: saved with a schedule \(\w+\), now 2/,
    )
  })

  test('holds for Muon', async () => {
    const [whole, cut] = [await temporaryFolder(), await temporaryFolder()]
    const optimizer = (parameters: readonly NamedParameter[]) =>
      new Muon(parameters, { filter: ({ name }) => name === 'lm_head.weight' })
    await run({ out: whole, optimizer })
    await run({ out: cut, optimizer, ...stopAfter(5) })
    await run({ out: cut, optimizer, resume: true })
    expect(numbersOf(cut)).toEqual(numbersOf(whole))
    const other = await errorOf(run({ out: cut, resume: true, optimizer: 'adamw' }))
    expect(other).toMatchObject({ code: 'E_CHECKPOINT', message: expect.stringMatching(/optimizer: saved with muon/) })
    const changed = await errorOf(run({ out: cut, resume: true, optimizer: 'adamw', allowChanges: true }))
    expect(changed.message).toMatch(/start a new run with the model in .*step-000012.model; nothing was changed/)
  })

  test.each(['adamw', 'muon'] as const)(
    'holds for moments in bf16, of which checkpoints hold no more: %s',
    async optimizer => {
      const [whole, cut] = [await temporaryFolder(), await temporaryFolder()]
      const narrow = { optimizer, moments: 'bf16' } as const
      const straight = await run({ out: whole, ...narrow })
      await run({ out: cut, ...narrow, ...stopAfter(5) })
      const stored = join(cut, 'checkpoints', 'step-000005')
      await using file = await readSafetensors(join(stored, 'optimizer.safetensors'))
      expect(file.keys().map(name => file.info(name).dtype)).toEqual(file.keys().map(() => 'bf16'))
      expect(file.keys().length).toBeGreaterThan(2)
      const second = await run({ out: cut, ...narrow, resume: true })
      expect(numbersOf(cut)).toEqual(numbersOf(whole))
      expect(second.weights).toEqual(straight.weights)

      // To f32 and back, where that is asked for.
      const wide = await errorOf(run({ out: cut, optimizer, resume: stored }))
      expect((wide as MoeError).details['differences']).toEqual([
        expect.stringMatching(/^optimizer: saved with .*"moments":"bf16".*, now (?!.*moments)/),
      ])
      const other = { out: cut, optimizer, resume: stored, allowChanges: true }
      const { result } = await run({ ...other, ...stopAfter(7) })
      expect(result.steps).toBe(7)
      const narrower = await errorOf(run({ ...narrow, out: cut, resume: true }))
      expect(narrower.message).toMatch(/optimizer: saved with (?!.*moments.*, now).*, now .*"moments":"bf16"/)
      expect((await run({ ...narrow, out: cut, resume: true, allowChanges: true })).result.steps).toBe(12)
    },
  )

  test('holds for a model that counts its steps, also when it was trained before', async () => {
    const [whole, cut] = [await temporaryFolder(), await temporaryFolder()]
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
    await run({ out: whole, model: new Scheduled() })
    await run({ out: cut, model: new Scheduled(), ...stopAfter(5) })
    await run({ out: cut, model: new Scheduled(), resume: true })
    expect(numbersOf(cut)).toEqual(numbersOf(whole))
  })

  test('holds for a model with random numbers, whatever the stream of the resuming model was', async () => {
    const [whole, cut] = [await temporaryFolder(), await temporaryFolder()]
    const options = { accumulate: 2, evalEvery: 2 }
    const straight = await run({ ...options, out: whole, model: new Gshard() })
    await run({ ...options, out: cut, model: new Gshard(), ...stopAfter(5) })
    const model = new Gshard({ random: new Random(9, 4, 7) })
    const second = await run({ ...options, out: cut, resume: true, model })
    expect(numbersOf(cut)).toEqual(numbersOf(whole))
    expect(second.weights).toEqual(straight.weights)
    const dropped = numbersOf(whole).map(({ kept }) => 1 - kept)
    expect(Math.min(...dropped)).toBeGreaterThan(0)

    const other = Object.assign(new Gshard(), { other: new Random(1) })
    const error = await errorOf(run({ ...options, out: cut, resume: true, model: other }))
    expect((error as MoeError).details['differences']).toEqual(['streams: saved with moe.random, now moe.random other'])
  })

  test('from an earlier checkpoint drops what came after it', async () => {
    const [whole, again] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: whole, checkpointEvery: 4 })
    await run({ out: again, checkpointEvery: 4, ...stopAfter(10) })
    await run({ out: again, checkpointEvery: 4, resume: join(again, 'checkpoints', 'step-000008'), keepCheckpoints: 9 })
    expect(numbersOf(again)).toEqual(numbersOf(whole))
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

  test('of two trainings into one folder, the second is refused and the first continues', async () => {
    const [whole, out] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: whole })
    let second: Promise<Error> | undefined
    const onEvent: TrainOptions['onEvent'] = event => {
      if (event.type === 'start') second = errorOf(run({ out, overwrite: true }))
    }
    await run({ out, onEvent })
    expect(await second).toMatchObject({ code: 'E_CONFIG', message: expect.stringMatching(/is writing to/) })
    expect(numbersOf(out)).toEqual(numbersOf(whole))
  })

  test("'auto' begins where nothing is, and goes on where something is", async () => {
    const out = await temporaryFolder()
    const first = await run({ out, resume: 'auto', ...stopAfter(3) })
    expect(first.events[0]).toMatchObject({ type: 'start', fromStep: 0 })
    const second = await run({ out, resume: 'auto' })
    expect(second.events[0]).toMatchObject({ type: 'start', fromStep: 3, fromTokens: first.result.tokens })
    const third = await run({ out, resume: 'auto' })
    expect([...new Set(third.events.map(({ type }) => type))]).toEqual(['start', 'evaluating', 'evaluation', 'end'])
  })

  test('of a finished run evaluates again, and its summary stays complete', async () => {
    const out = await temporaryFolder()
    const read = async () => JSON.parse(await readFile(join(out, 'summary.json'), 'utf8'))
    await run({ out })
    const before = await read()
    expect(Object.keys(before.balance)).toEqual(['maxVio', 'batches'])
    await run({ out, resume: true })
    const measured = { validation: expect.objectContaining({ loss: before.validation.loss }) }
    const peaks = { peakMemoryBytes: expect.any(Number), peakDeviceBytes: expect.any(Number) }
    expect(await read()).toEqual({ ...before, ...measured, ...peaks })
  })

  test('peak memory is that of the process with the highest peak', async () => {
    const out = await temporaryFolder()
    const first = await run({ out, ...stopAfter(3) })
    const file = join(first.result.checkpoint ?? '', 'trainer.json')
    const state = JSON.parse(await readFile(file, 'utf8'))
    const { peakMemoryBytes, peakDeviceBytes } = first.result
    expect(state.peakDeviceBytes).toBe(peakDeviceBytes)
    expect(state.peakMemoryBytes).toBeLessThanOrEqual(peakMemoryBytes)
    expect(state.peakMemoryBytes).toBeGreaterThan(1e7)
    // A process before this one, with another backend.
    await writeFile(file, JSON.stringify({ ...state, peakMemoryBytes: 2 ** 50, peakDeviceBytes: 1 }))
    const second = await run({ out, checkpointEvery: 5, ...stopAfter(6), resume: true })
    expect(second.result).toMatchObject({ peakMemoryBytes: 2 ** 50, peakDeviceBytes })
    const third = await run({ out, resume: true })
    expect(third.result).toMatchObject({ peakMemoryBytes: 2 ** 50, peakDeviceBytes })
    expect(JSON.parse(await readFile(join(out, 'summary.json'), 'utf8')).peakMemoryBytes).toBe(2 ** 50)
  })

  test('a finished run is not overwritten by accident', async () => {
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

  test('survives a crash in the middle of a line and of a checkpoint', async () => {
    const [whole, out] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: whole })
    await run({ out, ...stopAfter(6) })
    const metrics = join(out, 'metrics.jsonl')
    await writeFile(metrics, `${await readFile(metrics, 'utf8')}{"step":7,"loss":1.5,"nll":1.5}\n{"step":8,"lo`)
    await mkdir(join(out, 'checkpoints', '.writing-step-000008-1-0', 'model'), { recursive: true })
    await writeFile(join(out, 'checkpoints', 'latest'), 'step-000008\n')
    await run({ out, resume: true })
    expect(numbersOf(out)).toEqual(numbersOf(whole))
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000006', 'step-000012'])
  })
})

describe('bad checkpoints are refused and change nothing', () => {
  async function stopped(): Promise<{ out: string; path: string }> {
    const out = await temporaryFolder()
    const { result } = await run({ out, ...stopAfter(4) })
    return { out, path: result.checkpoint ?? '' }
  }

  async function refused(out: string, options: Partial<TrainOptions> = {}) {
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

  test.each(['model/model.safetensors', 'optimizer.safetensors', 'trainer.json'])('truncated %s', async file => {
    const { out, path } = await stopped()
    const bytes = await readFile(join(path, file))
    await writeFile(join(path, file), bytes.subarray(0, bytes.length - 5))
    const error = await refused(out)
    expect(error).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringContaining(file.split('/').at(-1) ?? ''),
    })
  })

  test.each(['model/model.safetensors', 'optimizer.safetensors', 'trainer.json', 'model'])(
    'corrupt at %s, the error names the latest intact one',
    async file => {
      const out = await temporaryFolder()
      await run({ out, checkpointEvery: 2, keepCheckpoints: 9, ...stopAfter(8) })
      const at = (step: number) => join(out, 'checkpoints', `step-00000${step}`)
      const cut = async (path: string) => writeFile(path, (await readFile(path)).subarray(0, 100))
      for (const step of [6, 8]) {
        if (file === 'model') await rm(join(at(step), file), { recursive: true })
        else await cut(join(at(step), file))
      }
      const error = await refused(out)
      expect(error).toMatchObject({ code: 'E_CHECKPOINT', details: { whole: at(4) } })
      expect(error.message).toContain(`${at(4)} is intact`)
      await run({ out, resume: at(4), checkpointEvery: 99 })
    },
  )

  test.each(['model/model.safetensors', 'optimizer.safetensors'])('missing %s', async file => {
    const { out, path } = await stopped()
    await writeFile(join(path, file), '')
    expect(await refused(out)).toMatchObject({ code: 'E_CHECKPOINT' })
  })

  test('a folder that is not a checkpoint', async () => {
    const { out } = await stopped()
    expect(await refused(out, { resume: out })).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/not a checkpoint of a training run/),
    })
    expect(await refused(out, { resume: join(out, 'nothing') })).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/no such folder; the latest checkpoint of the run is .*step-\d+$/),
    })
  })

  test('a state of another program', async () => {
    const { out, path } = await stopped()
    await writeFile(join(path, 'trainer.json'), '{"global_step": 4}')
    expect(await refused(out)).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/not a trainer state of this format/),
    })
  })

  test.each([
    ['balance', { a: 1 }],
    ['peakMemoryBytes', -1],
    ['streams', null],
    ['streams', { 'moe.random': { seed: 1, stream: 2 } }],
  ])('a state whose %s is %j', async (field, value) => {
    const { out, path } = await stopped()
    const file = join(path, 'trainer.json')
    await writeFile(file, JSON.stringify({ ...JSON.parse(await readFile(file, 'utf8')), [field]: value }))
    expect(await refused(out)).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringContaining(`has invalid ${field} ${JSON.stringify(value)}`),
    })
  })

  test('another run, with every difference, unless changes are allowed', async () => {
    const { out } = await stopped()
    const changed = { lr: 0.01, seed: 8, data: letterData(19) }
    const error = await refused(out, changed)
    expect(error).toMatchObject({ code: 'E_CHECKPOINT' })
    for (const text of ['seed: saved with 7, now 8', 'lr: saved with 0.05, now 0.01', 'data: ', 'allowChanges']) {
      expect(error.message).toContain(text)
    }
    const longer = await refused(out, { steps: 20 })
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

  test('nothing to resume from', async () => {
    expect(await refused(await temporaryFolder())).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/no checkpoint/),
    })
  })

  test('a model of another shape', async () => {
    const { out } = await stopped()
    class Wider extends BigramModel {
      extra = this.embed_tokens
    }
    const model = new Wider()
    const path = join(out, 'checkpoints', 'step-000004', 'optimizer.safetensors')
    await writeFile(path, await readFile(join(out, 'checkpoints', 'step-000004', 'model', 'model.safetensors')))
    const error = await errorOf(train(model, { ...settings, out, resume: true }))
    expect(error).toMatchObject({ code: 'E_CHECKPOINT', message: expect.stringMatching(/unnamed optimizer/) })
    disposeModule(model)
  })
})
