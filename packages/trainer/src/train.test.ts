import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { readSafetensors } from '@moe/checkpoint'
import {
  disposeModule,
  type InitOptions,
  Module,
  type MoeError,
  type NamedParameter,
  namedParameters,
  noGrad,
  quantizeWeights,
  Random,
  scope,
  setDefaultBackend,
  stateDict,
  type Tensor,
  tensor,
} from '@moe/core'
import { CapacityMoE } from '@moe/router'
import { afterEach, beforeAll, describe, expect, test } from 'vitest'
import { TokenDataset } from './data/token-dataset.ts'
import { TrainingOrder } from './data/training-order.ts'
import { evaluate } from './evaluate.ts'
import type { TrainEvent } from './events.ts'
import type { LossOutput, TrainableModel } from './model.ts'
import { AdamW } from './optim/adamw.ts'
import { Muon } from './optim/muon.ts'
import { piecewise } from './optim/schedule.ts'
import type { TrainOptions } from './options.ts'
import { readMetrics } from './report/metrics-log.ts'
import {
  BigramModel,
  letterData,
  letters,
  letterTexts,
  removeTemporaryFolders,
  roundingBackend,
  temporaryFolder,
} from './test-model.ts'
import { train } from './train.ts'
import { trainingStep } from './training-step.ts'

const backend = roundingBackend()
beforeAll(() => setDefaultBackend(backend))
afterEach(async () => {
  await removeTemporaryFolders()
  expect(backend.stats().handles).toBe(0)
})

const data = letterData()
const settings = { data, steps: 12, batchSize: 3, sequenceLength: 8, lr: 0.05, seed: 7, progress: false } as const

/** With a layer that draws which second choices it uses. */
class Gshard extends BigramModel {
  moe: CapacityMoE

  constructor(init: InitOptions = {}) {
    super(init)
    const config = { hidden_size: 6, moe_intermediate_size: 4, n_routed_experts: 4, router: 'gshard' } as const
    this.moe = new CapacityMoE({ ...config, capacity_factor: 4 }, { random: new Random(5), deviation: 1, ...init })
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

/** Trains a new model and gives back what is left of it. */
async function run(options: Partial<TrainOptions> & { model?: BigramModel } = {}) {
  const { model = new BigramModel(), ...rest } = options
  const events: TrainEvent[] = []
  const { onEvent } = rest
  try {
    const result = await train(model, {
      ...settings,
      ...rest,
      onEvent(event) {
        events.push(event)
        return onEvent?.(event)
      },
    })
    const weights = await Promise.all(
      stateDict(model).map(async ({ name, data }) => [name, Array.from(await data())] as const),
    )
    return { result, events, weights }
  } finally {
    disposeModule(model)
  }
}

const errorOf = (work: Promise<unknown>) =>
  work.then(
    () => new Error('it did not fail'),
    (error: Error) => error,
  )

/** Lines of a run without the one number that depends on the clock. */
const numbersOf = (out: string) =>
  readMetrics(join(out, 'metrics.jsonl')).map(({ tokensPerSecond: _, ...line }) => line)

/** Interrupts after a step. */
function stopAfter(step: number): Pick<TrainOptions, 'signal' | 'onEvent'> {
  const controller = new AbortController()
  return {
    signal: controller.signal,
    onEvent: event => {
      if (event.type === 'step' && event.step === step) controller.abort()
    },
  }
}

const checkpointsOf = async (out: string) => (await readdir(join(out, 'checkpoints'))).sort()

describe('a run', () => {
  test('waits for listeners that take their time', async () => {
    const order: string[] = []
    const onEvent = async (event: TrainEvent) => {
      order.push(`${event.type} begins`)
      await new Promise(resolve => setTimeout(resolve, 5))
      order.push(`${event.type} ends`)
    }
    const out = join(await temporaryFolder(), 'slow')
    await run({ steps: 3, out, evalEvery: 1, checkpointEvery: 1, onEvent })
    // Progress of a measurement is told from within it; all else is heard before anything else happens.
    const told = order.filter(line => !line.startsWith('measuring'))
    expect(told.length).toBeGreaterThan(20)
    for (let i = 0; i < told.length; i += 2)
      expect(told.slice(i, i + 2)).toEqual([told[i], told[i].replace('begins', 'ends')])
  })

  test('tells when what is learned ends otherwise than what the model generates', async () => {
    const ending = (...endTokens: number[]) => Object.assign(new BigramModel(), { endTokens })
    const noticesOf = async (model: BigramModel, training: TokenDataset) => {
      const { events } = await run({ model, data: { training }, steps: 1 })
      return events.flatMap(event => (event.type === 'notice' ? [event.message] : []))
    }
    const documents = TokenDataset.fromTexts(letterTexts(2, 50), letters) // '</s>', which is 11, behind each
    expect(await noticesOf(ending(11), documents)).toEqual([])
    expect(await noticesOf(ending(3, 11), documents)).toEqual([])
    expect(await noticesOf(ending(), documents)).toEqual([
      'what is learned ends with token 11, and what the model generates ends nowhere: make it with eos_token_id: 11',
    ])
    expect(await noticesOf(ending(1), documents)).toEqual([
      expect.stringContaining('ends at token 1: make it with eos_token_id: 11'),
    ])
    const endless = TokenDataset.fromTexts(letterTexts(2, 50), letters, { eos: null })
    expect(await noticesOf(ending(), endless)).toEqual([])
    expect(await noticesOf(ending(1), endless)).toEqual([
      expect.stringMatching(
        /has no token at its end, and what the model generates ends at token 1: train the tokenizer with an end token/,
      ),
    ])
    const answer = { tokens: [5, 6, 7, 11, 3], learned: [false, false, true, true, false] }
    const answers = TokenDataset.fromExamples([answer, answer])
    expect(await noticesOf(ending(11), answers)).toEqual([])
    expect(await noticesOf(ending(3), answers)).toEqual([expect.stringContaining('eos_token_id: 11')])
    expect(
      await noticesOf(
        ending(3),
        TokenDataset.fromTokens([
          [1, 2, 4],
          [3, 4],
        ]),
      ),
    ).toEqual([]) // Who knows?
  })

  test('is ended by a listener whose promise rejects, after what was saved before', async () => {
    const out = join(await temporaryFolder(), 'rejects')
    const onEvent = async (event: TrainEvent) => {
      if (event.type === 'step' && event.step === 3) throw new Error('mine')
    }
    const error = await errorOf(run({ steps: 10, out, checkpointEvery: 2, onEvent }))
    expect(error.message).toBe('mine')
    expect(await checkpointsOf(out)).toContain('step-000002')
    expect(await readFile(join(out, 'events.jsonl'), 'utf8')).toMatch(/"type":"fail".*mine/)
  })

  test.each([Number.NaN, -1, '0.5'])('does not take a step at a rate that is none: %j', async factor => {
    const model = new BigramModel()
    const before = await model.lm_head.weight.values()
    const schedule = (step: number) => (step === 0 ? 0 : (factor as number))
    const error = await errorOf(train(model, { ...settings, steps: 3, schedule }))
    expect(error).toMatchObject({
      code: 'E_CONFIG',
      message: `train: schedule(1) is ${typeof factor === 'string' ? '"0.5"' : factor}; give a number from 0 for every step, which lr is multiplied by`,
    })
    expect(await model.lm_head.weight.values()).toEqual(before)
    disposeModule(model)
  })

  test('learns, measures, and tells about it in order', async () => {
    const out = join(await temporaryFolder(), 'first')
    const { result, events } = await run({ steps: 150, out, evalEvery: 50, checkpointEvery: 60 })
    const steps = events.flatMap(event => (event.type === 'step' ? [event] : []))
    expect(steps.map(({ step }) => step)).toEqual(Array.from({ length: 150 }, (_, i) => i + 1))
    expect(steps[0].nll).toBeGreaterThan(2)
    expect(result.trainingLoss).toBeLessThan(1.5)
    expect(result.validation.loss).toBeLessThan(1.5)
    expect(result).toMatchObject({
      steps: 150,
      interrupted: false,
      stopped: 'finished',
      tokens: 150 * 24,
      backend: 'reference',
    })
    const others = events.flatMap(event =>
      event.type === 'step' || event.type === 'measuring'
        ? []
        : `${event.type} ${'step' in event ? event.step : ''}`.trim(),
    )
    expect(others).toEqual([
      'start',
      'evaluation 50',
      'checkpoint 60',
      'evaluation 100',
      'checkpoint 120',
      'checkpoint 150',
      'evaluation 150',
      'end',
    ])
  })

  test('writes metrics, a summary and checkpoints that transformers would find', async () => {
    const out = await temporaryFolder()
    const { result, events } = await run({
      out,
      checkpointEvery: 3,
      data: { training: letterTexts(20, 50), validation: ['abc'] },
      tokenizer: { ...letters, idToToken: id => `<${id}>`, toJSON: () => ({ version: '1.0' }) },
      eos: 2,
    })
    const lines = readMetrics(join(out, 'metrics.jsonl'))
    expect(lines).toHaveLength(12)
    expect(Object.keys(lines[0])).toEqual([
      'step',
      'loss',
      'nll',
      'lr',
      'gradNorm',
      'tokens',
      'tokensPerSecond',
      'half',
      'maxVio',
      'batches',
    ])
    expect(lines[3].half).toBeCloseTo(lines[3].loss / 2)
    const summary = JSON.parse(await readFile(join(out, 'summary.json'), 'utf8'))
    expect(summary.validation.bitsPerByte).toBe(result.validation.bitsPerByte)
    // The mean over the last tenth of 12 steps, which are steps 11 and 12.
    expect(summary.balance.maxVio).toBeCloseTo((lines[10].maxVio + lines[11].maxVio) / 2)
    expect(summary.peakMemoryBytes).toBeGreaterThan(1e7)
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000009', 'step-000012'])
    expect(await readFile(join(out, 'checkpoints', 'latest'), 'utf8')).toBe('step-000012\n')
    expect(result.checkpoint).toBe(join(out, 'checkpoints', 'step-000012'))
    expect((await readdir(join(result.checkpoint ?? '', 'model'))).sort()).toEqual([
      'model.safetensors',
      'tokenizer.json',
      'tokenizer_config.json',
    ])
    // One that is given, and one that has a usual name.
    const config = await readFile(join(result.checkpoint ?? '', 'model', 'tokenizer_config.json'), 'utf8')
    expect(JSON.parse(config)).toEqual({
      tokenizer_class: 'PreTrainedTokenizerFast',
      bos_token: '<10>',
      eos_token: '<2>',
    })
    expect(events.filter(({ type }) => type === 'checkpoint')).toHaveLength(4)
  })

  test('counts end tokens in the nats and text alone in the bytes', async () => {
    const model = new BigramModel()
    const { validation } = data
    const measured = await evaluate(model, validation, { sequenceLength: 16, batchSize: 2 })
    const whole = {
      tokens: validation.tokens,
      documents: Int32Array.from(validation.tokens, (_, i) => validation.documentAt(i)),
      rows: 1,
      length: validation.tokens.length,
    }
    const { nll, count } = scope(() =>
      noGrad(() => {
        const output = model.loss(whole, { training: false })
        return { nll: output.nll, count: output.count }
      }),
    )
    expect(measured.tokens).toBe(count)
    expect(count).toBe(3 * 51)
    expect(measured.bitsPerByte).toBeCloseTo((await nll.item()) / Math.LN2 / 150, 6)
    nll.dispose()
    disposeModule(model)
  })

  test('goes through all data an epoch whatever the batch, and weighs micro-batches by what they count', async () => {
    const whole = await run({ batchSize: 6, steps: 4 })
    const parts = await run({ batchSize: 2, accumulate: 3, steps: 4 })
    const losses = ({ events }: typeof whole) =>
      events.flatMap(event => (event.type === 'step' ? [event.loss, event.gradNorm] : []))
    for (const [i, value] of losses(parts).entries()) expect(value).toBeCloseTo(losses(whole)[i], 5)
    parts.weights.forEach(([name, values], i) => {
      expect(name).toBe(whole.weights[i][0])
      for (const [j, value] of values.entries()) expect(value).toBeCloseTo(whole.weights[i][1][j], 4)
    })
    const batches = parts.events.flatMap(event => (event.type === 'step' ? [event.metrics['batches']] : []))
    expect(batches).toEqual([3, 3, 3, 3])
  })

  test('tells how far a measurement is', async () => {
    const { events } = await run({ steps: 4, evalEvery: 3, evalTokens: 40 })
    const shares = (at: number) =>
      events.flatMap(event => (event.type === 'measuring' && event.step === at ? [event.done] : []))
    for (const at of [3, 4]) {
      expect(shares(at).length).toBeGreaterThan(2)
      expect(shares(at)).toEqual([...shares(at)].sort((a, b) => a - b))
      expect(shares(at).at(-1)).toBe(1)
    }
  })

  test('says that stored weights stay as they are', async () => {
    const model = new BigramModel()
    await quantizeWeights(model.embed_tokens, 'bf16')
    const { events } = await run({ model, steps: 2 })
    const notices = events.flatMap(event => (event.type === 'notice' ? [event.message] : []))
    expect(notices).toEqual([expect.stringMatching(/^46.2 % of the model's numbers are stored in fewer bits/)])
    const all = new BigramModel()
    await quantizeWeights(all, 'bf16')
    expect(await errorOf(run({ model: all }))).toMatchObject({
      code: 'E_CONFIG',
      message: expect.stringMatching(/nothing to train: of 3 parameters 2 are stored/),
    })
  })

  test('stops when its time is up, with a checkpoint', async () => {
    const out = await temporaryFolder()
    const { result, events } = await run({ out, steps: 100_000, timeLimitSeconds: 1e-6 })
    expect(result).toMatchObject({ steps: 1, stopped: 'time', interrupted: false })
    expect(events.at(-2)).toMatchObject({ type: 'stop', reason: 'time', checkpoint: result.checkpoint })
  })

  test('does without held-out data and without a folder', async () => {
    const { result } = await run({ data: { training: data.training } })
    expect(result.validation.bitsPerByte).toBeNaN()
    expect(result.checkpoint).toBeUndefined()
  })

  test('1,000 steps leave handles and memory as they were', async () => {
    setFlagsFromString('--expose-gc')
    const collect = runInNewContext('gc') as () => void
    const used: number[] = []
    const handles: number[] = []
    const model = new BigramModel()
    const before = backend.stats().handles
    await train(model, {
      ...settings,
      steps: 1000,
      evalEvery: 100,
      onEvent: event => {
        if (event.type !== 'step' || event.step % 50 !== 0) return
        collect()
        const { heapUsed, arrayBuffers } = process.memoryUsage()
        used.push(heapUsed + arrayBuffers)
        handles.push(backend.stats().handles)
      },
    })
    expect(backend.stats().handles).toBe(before)
    expect(new Set(handles).size).toBe(1)
    disposeModule(model)
    // The test process itself allocates now and then; a leak would lift every sample.
    const least = (from: number) => Math.min(...used.slice(from, from + 5))
    expect(least(15) / least(10)).toBeLessThan(1.02)
  })
})

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
    const model = new BigramModel({ deviation: 0.1 })
    const second = await run({ out: cut, accumulate: 2, resume: true, model })
    expect(second.result).toMatchObject({ interrupted: false, steps: 12 })
    expect(numbersOf(cut)).toEqual(numbersOf(whole))
    expect(second.weights).toEqual(straight.weights)
    expect(second.result.balance).toEqual(straight.result.balance)
    expect(second.result.validation.loss).toBe(straight.result.validation.loss)
  })

  test('holds for a batch that grows, whose tokens are counted and told beforehand', async () => {
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
    const second = await run({ out: cut, ...growing, resume: true, model: new BigramModel({ deviation: 0.1 }) })
    expect(second.events[0]).toMatchObject({ type: 'start', tokensPerStep: 2 * 24, tokens: sums.at(-1) })
    expect(second.weights).toEqual(straight.weights)
    await run({ out: cut, ...growing, overwrite: true, ...stopAfter(5) })
    await expect(run({ out: cut, accumulate: 2, resume: true })).rejects.toThrow(
      /accumulate .*: saved with a schedule \(\w+\), now 2/,
    )
  })

  test('holds for Muon, too', async () => {
    const [whole, cut] = [await temporaryFolder(), await temporaryFolder()]
    const optimizer = (parameters: readonly NamedParameter[]) =>
      new Muon(parameters, { takes: ({ name }) => name === 'lm_head.weight' })
    await run({ out: whole, optimizer })
    await run({ out: cut, optimizer, ...stopAfter(5) })
    await run({ out: cut, optimizer, resume: true })
    expect(numbersOf(cut)).toEqual(numbersOf(whole))
    const other = await errorOf(run({ out: cut, resume: true, optimizer: 'adamw' }))
    expect(other).toMatchObject({ code: 'E_CHECKPOINT', message: expect.stringMatching(/optimizer: saved with muon/) })
    const changed = await errorOf(run({ out: cut, resume: true, optimizer: 'adamw', allowChanges: true }))
    expect(changed.message).toMatch(/begin another run with the model in .*step-000012.model; nothing was changed/)
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

  test('holds for a model that draws, whatever the stream of the one that goes on was', async () => {
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

  test('from the checkpoint of another folder begins a run of its own', async () => {
    const [from, out] = [await temporaryFolder(), join(await temporaryFolder(), 'branch')]
    const first = await run({ out: from, ...stopAfter(4) })
    const before = numbersOf(from)
    const { result } = await run({ out, resume: first.result.checkpoint, lr: 0.01, allowChanges: true })
    expect(result.steps).toBe(12)
    expect(numbersOf(out).map(({ step }) => step)).toEqual([5, 6, 7, 8, 9, 10, 11, 12])
    expect(numbersOf(from)).toEqual(before)
  })

  test('of two trainings into one folder the second is refused, and the first goes on', async () => {
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
    expect(second.events[0]).toMatchObject({ type: 'start', fromStep: 3 })
    const third = await run({ out, resume: 'auto' })
    expect([...new Set(third.events.map(({ type }) => type))]).toEqual(['start', 'measuring', 'evaluation', 'end'])
  })

  test('of a finished run measures again, and its summary stays whole', async () => {
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

  test('its most memory is that of the process that took most', async () => {
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

  test('a finished folder is not written over by accident', async () => {
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
    'damaged at %s, the error names the latest that is whole',
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
      expect(error.message).toContain(`${at(4)} is whole`)
      await run({ out, resume: at(4), checkpointEvery: 99 })
    },
  )

  test.each(['model/model.safetensors', 'optimizer.safetensors'])('missing %s', async file => {
    const { out, path } = await stopped()
    await writeFile(join(path, file), '')
    expect(await refused(out)).toMatchObject({ code: 'E_CHECKPOINT' })
  })

  test('a folder that is something else', async () => {
    const { out } = await stopped()
    expect(await refused(out, { resume: out })).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/no checkpoint of a training run/),
    })
    expect(await refused(out, { resume: join(out, 'nothing') })).toMatchObject({ code: 'E_CHECKPOINT' })
  })

  test('a state of another program', async () => {
    const { out, path } = await stopped()
    await writeFile(join(path, 'trainer.json'), '{"global_step": 4}')
    expect(await refused(out)).toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/not a state of this trainer/),
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
      message: expect.stringContaining(`has ${field} ${JSON.stringify(value)}`),
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

describe('failures lose nothing', () => {
  const full = Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' })

  /** Writes half a model, then finds the disk full. */
  class FullDisk extends BigramModel {
    saves = 0
    readonly at: number
    constructor(at: number) {
      super()
      this.at = at
    }
    async save(folder: string): Promise<void> {
      const whole = ++this.saves !== this.at
      const { saveCheckpoint } = await import('@moe/checkpoint')
      if (whole) await saveCheckpoint(folder, stateDict(this))
      else {
        await writeFile(join(folder, 'model.safetensors'), 'half')
        throw full
      }
    }
  }

  test('a full disk leaves the previous checkpoint, says so, and the run goes on from there', async () => {
    const [whole, out] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: whole })
    const error = await errorOf(run({ out, checkpointEvery: 4, model: new FullDisk(2) }))
    expect(error).toMatchObject({ code: 'E_CHECKPOINT', details: { step: 8 } })
    expect(error.message).toMatch(/saving step 8 failed: ENOSPC.*step-000004 is whole.*resume/)
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000004'])
    await run({ out, checkpointEvery: 4, resume: true })
    expect(numbersOf(out)).toEqual(numbersOf(whole))
  })

  test('an error that says itself what to do is not told to do two things', async () => {
    const out = await temporaryFolder()
    class Refused extends BigramModel {
      async save(folder: string): Promise<void> {
        await mkdir(join(folder, 'model.safetensors'))
        const { saveCheckpoint } = await import('@moe/checkpoint')
        await saveCheckpoint(folder, stateDict(this))
      }
    }
    const { message, cause } = await errorOf(run({ out, checkpointEvery: 4, model: new Refused() }))
    expect((cause as Error).message).toMatch(/model\.safetensors: writing failed: .*free some space/)
    expect(message).toMatch(/step-000004: saving step 4 failed: model\.safetensors: writing failed: /)
    expect(message.match(/free some space/g)).toHaveLength(1)
  })

  test('a full disk at the first checkpoint leaves an empty list', async () => {
    const out = await temporaryFolder()
    const error = await errorOf(run({ out, checkpointEvery: 4, model: new FullDisk(1) }))
    expect(error.message).toMatch(/no earlier checkpoint/)
    expect(await checkpointsOf(out)).toEqual([])
  })

  test('NaN in a weight stops the run, names step and parameter, and keeps the checkpoint', async () => {
    const out = await temporaryFolder()
    const model = new BigramModel()
    const failures: unknown[] = []
    const poison: TrainOptions['onEvent'] = event => {
      if (event.type === 'fail') failures.push(event.error)
      if (event.type !== 'step' || event.step !== 6) return
      const values = new Float32Array(72).fill(0.1)
      values[17] = Number.NaN
      model.lm_head.weight.assign(tensor(values, [12, 6]))
    }
    const error = await errorOf(run({ out, checkpointEvery: 4, model, onEvent: poison }))
    expect(failures).toEqual([error])
    expect(error).toMatchObject({ code: 'E_NAN', details: { step: 7, parameter: 'lm_head.weight', kind: 'value' } })
    expect(error.message).toMatch(/step 7 .*lm_head\.weight: 1 of 72 elements/)
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000004'])
    expect(numbersOf(out)).toHaveLength(6)
  })

  test('a model that an update made infinite is not saved', async () => {
    const out = await temporaryFolder()
    const model = new BigramModel()
    const poison: TrainOptions['onEvent'] = event => {
      if (event.type === 'step' && event.step === 8)
        model.offset.assign(tensor(new Float32Array(12).fill(Number.POSITIVE_INFINITY)))
    }
    const error = await errorOf(run({ out, checkpointEvery: 4, model, onEvent: poison }))
    expect(error).toMatchObject({ code: 'E_NAN', details: { step: 8, parameter: 'offset' } })
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000004'])
  })

  test('a step with an infinite gradient changes no weight', async () => {
    const model = new BigramModel()
    const broken = Object.assign(model, {
      loss: (batch: Parameters<BigramModel['loss']>[0]) => {
        const output = BigramModel.prototype.loss.call(model, batch)
        return { ...output, loss: output.loss.mul(1e38).mul(1e38) }
      },
    })
    const parameters = namedParameters(broken)
    const optimizer = new AdamW(parameters)
    const before = await model.lm_head.weight.values()
    const order = new TrainingOrder(data.training, { sequenceLength: 8, lookahead: 1, batchSize: 2 })
    const error = await errorOf(trainingStep(broken, parameters, optimizer, order.step(0), { lr: 1, step: 1 }))
    expect(error).toMatchObject({ code: 'E_NAN' })
    expect(await model.lm_head.weight.values()).toEqual(before)
    expect(model.lm_head.weight.grad).toBeNull()
    optimizer.dispose()
    disposeModule(model)
  })

  test('settings that cannot be are told all at once', async () => {
    const model = new BigramModel()
    const error = await errorOf(train(model, { ...settings, steps: 0, batchSize: 1.5, lr: Number.NaN, resume: true }))
    expect(error).toMatchObject({ code: 'E_CONFIG' })
    for (const text of ['steps is 0', 'batchSize is 1.5', 'lr is NaN', 'resume is given without out'])
      expect(error.message).toContain(text)
    const wrong = { ...settings, schedule: 5, data: undefined } as unknown as TrainOptions
    const more = await errorOf(train(model, wrong))
    for (const text of ['schedule is 5, needs a function', 'data is missing']) expect(more.message).toContain(text)
    const slow = { ...settings, moments: 'bf16', betas: [0.9, 0.999] } as const
    expect((await errorOf(train(model, slow))).message).toMatch(/one keeps 0\.999 of itself/)
    const others = { ...settings, data: ['text'], betas: 0.9, out: 3, signal: new AbortController(), progress: 'yes' }
    const { message } = await errorOf(train(model, others as unknown as TrainOptions))
    for (const name of ['data has no training part', 'betas is 0.9', 'out is 3', 'pass .signal', 'progress is "yes"']) {
      expect(message).toContain(name)
    }
    expect(await errorOf(train(model, undefined as unknown as TrainOptions))).toMatchObject({
      code: 'E_CONFIG',
    })
    disposeModule(model)
  })

  test('a model that is none, and one with a loss that is none, are told what a model needs', async () => {
    for (const [none, message] of [
      [null, /train: the model is null; pass a Module with lookahead and loss/],
      [{}, /the model has no method loss/],
      [
        new (class extends Module {
          lookahead = 1
          loss() {}
        })(),
        /the model has no parameters; give it some in fields/,
      ],
    ] as const) {
      expect((await errorOf(train(none as unknown as TrainableModel, settings))).message).toMatch(message)
    }
    const returning = (change: (output: LossOutput) => unknown) => {
      const model = new BigramModel()
      return Object.assign(model, {
        loss: (...input: Parameters<BigramModel['loss']>) => change(BigramModel.prototype.loss.apply(model, input)),
      }) as TrainableModel
    }
    for (const [change, message] of [
      [async output => output, /^loss: the model returned a promise; make it synchronous/],
      [({ loss }) => loss, /returned a tensor alone; return \{ loss, nll, count, metrics \}/],
      [() => undefined, /returned undefined/],
      [({ nll, ...others }) => others, /returned nll = undefined, no tensor/],
      [output => ({ ...output, nll: output.nll.expand([2]) }), /returned nll of shape \[2\]/],
      [({ count, ...others }) => others, /returned count = undefined/],
      [({ metrics, ...others }) => others, /returned metrics = undefined/],
      [output => ({ ...output, metrics: { half: 0.5 } }), /returned half = 0.5, no tensor/],
    ] as ReadonlyArray<[(output: LossOutput) => unknown, RegExp]>) {
      const model = returning(change)
      const wrong = [
        await errorOf(train(model, settings)),
        await errorOf(evaluate(model, data.validation, { sequenceLength: 8, batchSize: 1 })),
      ]
      for (const error of wrong)
        expect(error).toMatchObject({ code: 'E_ATTR', message: expect.stringMatching(message) })
      disposeModule(model)
    }
  })

  test('a measurement without sizes, data or model is refused', async () => {
    const model = new BigramModel()
    const measure = evaluate as (...input: unknown[]) => Promise<unknown>
    const sizes = { sequenceLength: 8, batchSize: 1 }
    expect((await errorOf(measure(model, data.validation, {}))).message).toMatch(
      /sequenceLength is undefined, batchSize is/,
    )
    expect((await errorOf(measure(model, ['text'], sizes))).message).toMatch(
      /no TokenDataset; pass TokenDataset.fromTexts/,
    )
    expect((await errorOf(measure(null, data.validation, sizes))).message).toMatch(/evaluate: the model is null/)
    disposeModule(model)
  })

  test('texts without a tokenizer, and tokens that the model has no embeddings for', async () => {
    const model = new BigramModel()
    const without = await errorOf(train(model, { ...settings, data: { training: ['abc'], validation: [] } }))
    expect(without).toMatchObject({ code: 'E_CONFIG', message: expect.stringMatching(/no tokenizer/) })
    const larger = { ...letters, vocabSize: 500 }
    const error = await errorOf(
      train(model, { ...settings, data: { training: ['abc'], validation: [] }, tokenizer: larger }),
    )
    expect(error).toMatchObject({
      code: 'E_DATA',
      message: expect.stringMatching(/ids up to 499, the model has embeddings for 12/),
    })
    disposeModule(model)
  })
})
