/** @file Recorded and replayed steps give the same bits as steps op by op, on a backend that can record. */
import {
  type Backend,
  concat,
  type Graph,
  Module,
  MoeError,
  namedParameters,
  noGrad,
  Parameter,
  type Precision,
  Random,
  stateDict,
  tensor,
} from '@moe/core'
import { DeepSeek, type DeepSeekConfigInput, type DeepSeekOptions } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { auxFree } from '@moe/router'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import { TrainingOrder } from './data/training-order.ts'
import type { StepEvent } from './events.ts'
import type { StagedStep, TrainableModel } from './model.ts'
import { AdamW } from './optim/adamw.ts'
import { Muon } from './optim/muon.ts'
import type { TrainOptions } from './options.ts'
import type { Ranks } from './ranks.ts'
import { smallConfig, smallData } from './test-deepseek.ts'
import { train } from './train.ts'
import { TrainingSteps } from './training-steps.ts'

const native = await createBackend()
afterAll(() => native.dispose())
afterEach(() => expect(native.stats().handles).toBe(0))

/** A backend that counts captures and replays. */
function counting() {
  const counts = { captures: 0, replays: 0 }
  const backend: Backend = {
    ...native,
    capture(fn, options) {
      counts.captures++
      const graph: Graph<ReturnType<typeof fn>> = native.capture(fn, options)
      return {
        ...graph,
        replay(updates) {
          counts.replays++
          graph.replay(updates)
        },
      }
    },
  }
  return { backend, counts }
}

const tiny: DeepSeekConfigInput = { ...smallConfig, num_nextn_predict_layers: 2 }

const settings = {
  data: { training: smallData() },
  batchSize: 2,
  sequenceLength: 8,
  lr: 5e-3,
  progress: false,
  handleSignals: false,
} as const

async function run(options: Partial<TrainOptions>, model: DeepSeekOptions & { config?: DeepSeekConfigInput } = {}) {
  const { backend, counts } = counting()
  const { config = tiny, ...rest } = model
  const objective = {
    biasSpeed: 0.01,
    mtpWeight: (step: number) => 0.3 / (1 + step),
    mtpAcceptance: true,
    ...rest.objective,
  }
  const trainee = new DeepSeek(config, { seed: 1, backend, ...rest, ...(rest.balancer ? {} : { objective }) })
  const steps: Array<Omit<StepEvent, 'tokensPerSecond'>> = []
  try {
    await train(trainee, {
      ...settings,
      steps: 10,
      ...options,
      onEvent(event) {
        if (event.type !== 'step') return
        const { tokensPerSecond: _, ...numbers } = event
        steps.push(numbers)
      },
    })
    const weights = await Promise.all(
      stateDict(trainee).map(async ({ name, data }) => [name, Array.from(await data())]),
    )
    return { counts, steps, weights }
  } finally {
    trainee.dispose()
  }
}

/** Expects the same steps and weights with and without recording. Returns the recorded run. */
async function expectSameBits(
  options: Partial<TrainOptions>,
  model: DeepSeekOptions & { config?: DeepSeekConfigInput } = {},
) {
  const eager = await run({ ...options, record: false }, model)
  const recorded = await run(options, model)
  expect(eager.counts).toEqual({ captures: 0, replays: 0 })
  expect(recorded.steps).toEqual(eager.steps)
  expect(recorded.weights).toEqual(eager.weights)
  return recorded
}

describe('recorded steps equal steps op by op with', () => {
  test.each([
    { optimizer: 'adamw', accumulate: 1 },
    { optimizer: 'adamw', accumulate: 3 },
    { optimizer: 'muon', accumulate: 1 },
    { optimizer: 'muon', accumulate: 2 },
  ] as const)('$optimizer, $accumulate micro-batches', async options => {
    const { counts } = await expectSameBits(options)
    // Most steps replay a pass per micro-batch, the norm and the update.
    expect(counts.replays).toBeGreaterThan(4 * (options.accumulate + 2))
    expect(counts.captures).toBeGreaterThanOrEqual(3)
  })

  test.each<[string, Partial<TrainOptions>]>([
    ['bf16', { precision: 'bf16' satisfies Precision }],
    ['moments in bf16', { moments: 'bf16' }],
    ['Muon with a momentum in bf16', { moments: 'bf16', optimizer: 'muon' }],
    ['no clipping', { clip: Number.POSITIVE_INFINITY }],
    ['strong clipping', { clip: 0.01 }],
    ['evaluations between the steps', { evalEvery: 3, data: { training: smallData(), validation: smallData() } }],
  ])('%s', async (_name, options) => {
    expect((await expectSameBits({ steps: 6, ...options })).counts.replays).toBeGreaterThan(6)
  })

  test('an EMA that is evaluated between the steps, without further graphs', async () => {
    const options: Partial<TrainOptions> = { evalEvery: 3, data: { training: smallData(), validation: smallData() } }
    const without = await run(options)
    for (const precision of ['f32', 'bf16'] as const) {
      const { counts, steps, weights } = await expectSameBits({ ...options, precision, ema: 0.9 })
      expect(counts).toEqual(without.counts)
      if (precision === 'f32') expect({ steps, weights }).toEqual({ steps: without.steps, weights: without.weights })
    }
  })

  test('a growing batch, without further graphs for its additional micro-batches', async () => {
    const accumulate = (step: number) => [1, 1, 2, 2, 2, 3, 3, 4, 4, 5][step]
    const { counts } = await expectSameBits({ accumulate, data: { training: smallData(), validation: smallData() } })
    const steady = await expectSameBits({ accumulate: 2, data: { training: smallData(), validation: smallData() } })
    expect(counts.captures).toBeLessThanOrEqual(steady.counts.captures + 3)
    expect(counts.replays).toBeGreaterThan(3 + 4 + 4 + 5)
  })

  test.each(['selective', 'layers'] as const)('%s recomputation, with the same results as without', async recompute => {
    const plain = await run({ steps: 6, accumulate: 2 })
    const recomputed = await expectSameBits({ steps: 6, accumulate: 2 }, { recompute })
    expect(recomputed.counts.replays).toBeGreaterThan(6)
    expect(recomputed.steps).toEqual(plain.steps)
    expect(recomputed.weights).toEqual(plain.weights)
  })

  test('a dense model', async () => {
    const dense = { ...tiny, num_nextn_predict_layers: 0, first_k_dense_replace: 3 }
    expect((await expectSameBits({ steps: 6 }, { config: dense })).counts.replays).toBeGreaterThan(6)
  })
})

test('the next batch is prepared while the device computes', async () => {
  const order: string[] = []
  const { backend } = counting()
  const logging: Backend = {
    ...backend,
    capture(fn, options) {
      const graph = native.capture(fn, options)
      return {
        ...graph,
        replay(updates) {
          order.push('replay')
          graph.replay(updates)
        },
      }
    },
  }
  class Logging extends DeepSeek {
    override get staged() {
      const staged = super.staged as NonNullable<DeepSeek['staged']>
      const inputs: typeof staged.inputs = rows => {
        order.push('inputs')
        return staged.inputs(rows)
      }
      return { ...staged, inputs }
    }
  }
  const model = new Logging(tiny, { seed: 1, backend: logging })
  await train(model, { ...settings, steps: 5 })
  model.dispose()
  // After the pass and the norm are submitted, before the update.
  expect(order.join(' ')).toContain('replay replay inputs replay')
})

test('a model with random numbers or schedules inside its ops runs op by op', async () => {
  expect((await run({ steps: 4 }, { balancer: auxFree() })).counts.captures).toBe(0)
  expect((await run({ steps: 4 }, { dropping: { devices: 2 } })).counts.captures).toBe(0)
})

test('a model that draws random numbers in a recorded part is rejected, because every replay would repeat them', async () => {
  class Drawing extends DeepSeek {
    readonly noise = [new Random(2)]
    override get staged() {
      const staged = super.staged as NonNullable<DeepSeek['staged']>
      const loss: typeof staged.loss = inputs => {
        this.noise[0].next()
        return staged.loss(inputs)
      }
      return { ...staged, loss }
    }
  }
  const model = new Drawing(tiny, { seed: 1, backend: native })
  const error = await train(model, { ...settings, steps: 4 }).catch((thrown: MoeError) => thrown)
  model.dispose()
  expect(error).toMatchObject({
    code: 'E_CONFIG',
    message: expect.stringMatching(/draws random numbers from noise\.0 in staged\.loss/),
  })
})

test('a subclass that overrides loss runs op by op, with that loss', async () => {
  let calls = 0
  class Overriding extends DeepSeek {
    override loss(...args: Parameters<DeepSeek['loss']>) {
      calls++
      return super.loss(...args)
    }
  }
  const { backend, counts } = counting()
  const model = new Overriding(tiny, { seed: 1, backend })
  await train(model, { ...settings, steps: 4 })
  model.dispose()
  expect([calls, counts.captures]).toEqual([4, 0])
})

test('gradients that share memory are summed over the ranks separately', async () => {
  const { backend } = counting()
  /** Both parameters get the gradient of their sum. */
  class Sum extends Module implements TrainableModel {
    readonly lookahead = 1
    readonly first = new Parameter(tensor([1, -2], undefined, { backend }))
    readonly second = new Parameter(tensor([3, 4], undefined, { backend }))
    readonly staged: StagedStep = {
      inputs: () => ({ arrays: {}, count: 1 }),
      loss: () => ({ ...this.loss(), carried: [] }),
      afterInputs: () => ({}),
      after() {},
      report: async () => ({}),
    }
    loss() {
      const sum = this.first.add(this.second)
      const loss = sum.mul(sum).sum()
      return { loss, nll: loss.detach(), count: 1, metrics: {} }
    }
  }
  // The other rank has the same gradients. Like large tensors, each is sent on its own.
  const ranks: Ranks = {
    rank: 0,
    size: 2,
    allReduce: async tensors => tensors.map(each => noGrad(() => each.mul(2))),
    async allReduceInPlace(tensors) {
      for (const each of tensors)
        backend.write?.(
          each,
          (await each.values()).map(x => 2 * x),
        )
    },
    allGather: async each => noGrad(() => concat([each, each])),
  }
  const batch = { rows: 1, length: 1, tokens: new Int32Array(2), documents: new Int32Array(2) }
  const runs = []
  for (const record of [false, true]) {
    const model = new Sum()
    const parameters = namedParameters(model)
    const optimizer = new AdamW(parameters)
    const steps = new TrainingSteps(model, parameters, optimizer, { record, ranks })
    const norms: number[] = []
    for (let step = 0; step < 4; step++) {
      norms.push((await steps.step([batch], { lr: 0.1 })).gradNorm)
    }
    expect(steps.replaying).toBe(record)
    runs.push({ norms, weights: await Promise.all(parameters.map(({ parameter }) => parameter.values())) })
    for (const each of [steps, optimizer, model.first, model.second]) each.dispose()
  }
  expect(runs[1]).toEqual(runs[0])
})

test.each([
  { without: 'pass', nth: 1, accumulate: 1 },
  { without: 'norm', nth: 2, accumulate: 1 },
  { without: 'update', nth: 3, accumulate: 1 },
  { without: 'update', nth: 3, accumulate: 2 },
])(
  'steps continue op by op if memory for the graph of the $without is missing, $accumulate micro-batches',
  async ({ nth, accumulate }) => {
    const { backend } = counting()
    let captures = 0
    const full: Backend = {
      ...backend,
      capture(fn, options) {
        if (++captures < nth) return backend.capture?.(fn, options) as Graph<ReturnType<typeof fn>>
        throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: 'capture', problem: 'no memory' })
      },
    }
    const numbers = await run({ steps: 4, accumulate }, { backend: full })
    expect(captures).toBe(nth)
    expect(numbers.steps).toEqual((await run({ steps: 4, accumulate, record: false })).steps)
  },
)

describe('with too little memory', () => {
  async function limited(memoryLimit: number | undefined, options: Partial<TrainOptions>) {
    const backend = await createBackend({ memoryLimit })
    const model = new DeepSeek(tiny, { seed: 1, backend })
    const losses: number[] = []
    const error = await train(model, {
      ...settings,
      steps: 4,
      ...options,
      onEvent: event => event.type === 'step' && losses.push(event.loss),
    }).catch(caught => caught)
    model.dispose()
    const { handles, bytes, peakBytes } = backend.stats()
    backend.dispose()
    expect({ handles, bytes }).toEqual({ handles: 0, bytes: 0 })
    return { losses, error, peakBytes }
  }

  test.each([
    { optimizer: 'adamw', accumulate: 1 },
    { optimizer: 'muon', accumulate: 2 },
  ] as const)(
    'a run fails without leaking tensors, but not if steps op by op have enough: $optimizer, $accumulate micro-batches',
    async options => {
      const free = await limited(undefined, { ...options, record: false })
      for (const share of [0.35, 0.6, 0.8, 0.95, 0.999, 1, 1.02, 1.1]) {
        for (const record of [false, true]) {
          const { losses, error } = await limited(Math.floor(share * free.peakBytes), { ...options, record })
          if (share >= 1) expect(losses).toEqual(free.losses)
          else if (losses.length < 4) expect(error).toMatchObject({ code: 'E_OUT_OF_MEMORY' })
        }
      }
    },
  )
})

test('a device that is lost during a step causes one error and no unhandled rejection', async () => {
  let isLost = false
  const failure = () => new MoeError({ code: 'E_BACKEND', op: 'test', problem: 'the device is lost' })
  let replays = 0
  const backend: Backend = {
    ...native,
    download: value => (isLost ? Promise.reject(failure()) : native.download(value)),
    capture(fn, options) {
      const graph = native.capture(fn, options)
      return {
        ...graph,
        replay(updates) {
          // The pass is still submitted, but the norm fails.
          if (isLost && ++replays > 1) throw failure()
          graph.replay(updates)
        },
      }
    },
  }
  const model = new DeepSeek(tiny, { seed: 1, backend })
  const lost = train(model, {
    ...settings,
    steps: 6,
    onEvent: event => {
      if (event.type === 'step' && event.step === 3) isLost = true
    },
  })
  await expect(lost).rejects.toMatchObject({ code: 'E_BACKEND' })
  isLost = false
  model.dispose()
})

describe('TrainingSteps', () => {
  test('an unknown precision is rejected at creation, also by optimizers', () => {
    const model = new DeepSeek(tiny, { seed: 1, backend: counting().backend })
    const parameters = namedParameters(model)
    const precision = 'half' as 'bf16'
    expect(() => new Muon(parameters, { precision })).toThrow('Muon: unknown precision "half"')
    const optimizer = new AdamW(parameters)
    const make = () => new TrainingSteps(model, parameters, optimizer, { precision })
    expect(make).toThrow(`TrainingSteps: unknown precision "half"; pass 'f32', 'bf16' or 'fp8'`)
    optimizer.dispose()
    model.dispose()
  })

  function prepare(record = true) {
    const { backend, counts } = counting()
    const model = new DeepSeek(tiny, { seed: 1, backend })
    const parameters = namedParameters(model)
    const optimizer = new AdamW(parameters)
    const steps = new TrainingSteps(model, parameters, optimizer, { record })
    // An order in which the window with padding comes late.
    const { batchSize, sequenceLength } = settings
    const order = new TrainingOrder(smallData(), { batchSize, sequenceLength, seed: 2, lookahead: model.lookahead })
    const dispose = () => {
      steps.dispose()
      optimizer.dispose()
      model.dispose()
    }
    return { counts, model, steps, order, dispose }
  }

  test('records again after an assignment to a parameter', async () => {
    const [recorded, opByOp] = [prepare(), prepare(false)]
    const losses: number[][] = []
    for (const { model, steps, order, dispose } of [recorded, opByOp]) {
      const ofRun: number[] = []
      for (let step = 0; step < 6; step++) {
        if (step === 4) {
          const { weight } = model.lm_head
          weight.assign(noGrad(() => weight.mul(2)))
        }
        ofRun.push((await steps.step(order.step(step), { lr: 1e-3 })).loss)
        expect(steps.replaying).toBe(step > 0 && model === recorded.model)
      }
      losses.push(ofRun)
      dispose()
    }
    expect(losses[0]).toEqual(losses[1])
    expect(recorded.counts.captures).toBe(6)
  })

  test('a prepared batch is used once, so that its arrays may then contain other tokens', async () => {
    const losses = []
    for (const record of [true, false]) {
      const { steps, order, dispose } = prepare(record)
      const ofRun: number[] = []
      const [batch] = order.step(0)
      for (let step = 0; step < 5; step++) {
        batch.tokens.set(order.step(step)[0].tokens)
        if (step % 2 === 1) steps.prepare([batch])
        ofRun.push((await steps.step([batch], { lr: 1e-3 })).loss)
      }
      losses.push(ofRun)
      dispose()
    }
    expect(losses[0]).toEqual(losses[1])
  })

  test('records again when a parameter is frozen or the objective has changed', async () => {
    const losses = []
    for (const record of [true, false]) {
      const { counts, model, steps, order, dispose } = prepare(record)
      const ofRun: unknown[] = []
      for (let step = 0; step < 9; step++) {
        if (step === 3) model.lm_head.weight.trainable = false
        if (step === 5) model.objective.mtpAcceptance = true
        if (step === 7) model.objective.mtpWeight = 0.05
        const { loss, metrics } = await steps.step(order.step(step), { lr: 1e-3 })
        ofRun.push({ loss, metrics })
      }
      losses.push(ofRun)
      // Three recordings of three graphs: at first, with the frozen parameter, and with mtpAcceptance. mtpWeight is an input of the graphs.
      expect(counts.captures).toBe(record ? 9 : 0)
      dispose()
    }
    expect(losses[0]).toEqual(losses[1])
  })

  test('a loss that is not finite changes nothing, and the next step works', async () => {
    const { model, steps, order, dispose } = prepare()
    for (let step = 0; step < 3; step++) await steps.step(order.step(step), { lr: 1e-3 })
    const { weight } = model.lm_head
    const before = await weight.values()
    model.backend.write?.(
      weight,
      Float32Array.from(before, () => Number.NaN),
    )
    await expect(steps.step(order.step(3), { lr: 1e-3, step: 4 })).rejects.toMatchObject({ code: 'E_NAN' })
    expect((await weight.values()).every(Number.isNaN)).toBe(true)
    model.backend.write?.(weight, before)
    const next = await steps.step(order.step(3), { lr: 1e-3 })
    expect(next.loss).toBeGreaterThan(0)
    dispose()
  })

  test('a non-finite gradient is reported with the same parameter, recorded as op by op', async () => {
    const names: unknown[] = []
    for (const record of [true, false]) {
      const { model, steps, order, dispose } = prepare(record)
      for (let step = 0; step < 3; step++) await steps.step(order.step(step), { lr: 1e-3 })
      const { weight } = model.lm_head
      // Finite values whose products are not.
      model.backend.write?.(weight, new Float32Array(weight.size).fill(3e38))
      const error = await steps.step(order.step(3), { lr: 1e-3 }).catch((thrown: MoeError) => thrown)
      expect(error).toMatchObject({ code: 'E_NAN', details: { kind: 'gradient' } })
      names.push((error as MoeError).details?.['parameter'])
      dispose()
    }
    expect(names[0]).toBeTypeOf('string')
    expect(names[0]).toBe(names[1])
  })
})
