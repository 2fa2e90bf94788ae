/** @file A DeepSeek model in stages, by every schedule, beside the whole model on one rank. */
import { type Backend, full, type NamedParameter, namedParameters, scope, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import type { DeepSeek, DeepSeekOptions } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { auxFree, combineBalancers, sequenceWise } from '@moe/router'
import { AdamW } from '@moe/trainer'
import { beforeEach, describe, expect, test } from 'vitest'
import type { Communicator } from '../communicator/communicator.ts'
import { local } from '../communicator/local.ts'
import { dualPipe, dualPipeV } from '../schedule/dual-pipe.ts'
import { interleaved, oneForwardOneBackward } from '../schedule/one-f-one-b.ts'
import type { PipelineSchedule } from '../schedule/schedule.ts'
import { zeroBubbleH1, zeroBubbleH2, zeroBubbleV } from '../schedule/zero-bubble.ts'
import { batchesOf, type Changes, gradientsOf, newModel, weightsOf, wholeStep } from '../test-steps.ts'
import { Pipeline } from './pipeline.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

const schedules: PipelineSchedule[] = [
  oneForwardOneBackward(1, 2),
  oneForwardOneBackward(4, 6),
  // A stage for every layer, the head and every MTP module.
  oneForwardOneBackward(11, 3),
  interleaved(2, 4, 2),
  zeroBubbleH1(4, 6),
  zeroBubbleH2(2, 4),
  zeroBubbleV(2, 4),
  dualPipe(4, 8),
  dualPipeV(2, 5),
]
const named = schedules.map(schedule => [`${schedule.name}, ${schedule.ranks.length} ranks`, schedule] as const)

// The order of sums differs, and what goes between ranks is rounded to f32.
const near = (numbers: readonly number[] | null) => numbers?.map(x => expect.closeTo(x, 5)) ?? null
const allNear = (numbers: Readonly<Record<string, number[] | null>>) =>
  Object.fromEntries(Object.entries(numbers).map(([name, values]) => [name, near(values)]))

/** What this rank has of numbers of the whole model. */
const partOf = (
  whole: Readonly<Record<string, number[] | null>>,
  { parameters }: Pick<Pipeline<never>, 'parameters'>,
) =>
  Object.fromEntries(
    parameters.map(({ name, parameter: { shape, size }, firstRow }) => {
      const from = firstRow === undefined ? 0 : (firstRow * size) / shape[0]
      return [name, firstRow === undefined ? whole[name] : (whole[name]?.slice(from, from + size) ?? null)]
    }),
  )

interface Several {
  /** Pipelines at once. */
  readonly replicas?: number
  /** Of these, those that share experts out. */
  readonly expertParallelSize?: number
}

/** Steps on all ranks, each beside the whole model's. */
async function expectWhole(
  schedule: PipelineSchedule,
  make: () => DeepSeek,
  rounds = 1,
  { replicas = 1, expertParallelSize = 1 }: Several = {},
): Promise<void> {
  const microBatches = replicas * schedule.microBatches
  const { loss, metrics, gradients, gradNorm } = wholeStep(make(), microBatches)
  const trained = new Set<string>()
  /** Handles that all ranks together hold after each step. */
  const held: number[] = []
  await local(replicas * schedule.ranks.length, async ranks => {
    const model = make()
    const pipeline = new Pipeline(model, schedule, ranks, { expertParallelSize })
    const { rank, world } = pipeline.dataShard
    expect(world).toBe(replicas)
    const batches = batchesOf(microBatches, model).filter((_, m) => m % world === rank)
    for (let round = 0; round < rounds; round++) {
      const found = await pipeline.step(batches)
      expect(found.loss).toBeCloseTo(loss, 5)
      expect(found.gradNorm).toBeCloseTo(gradNorm, 5)
      expect(found.metrics).toEqual(
        Object.fromEntries(Object.entries(metrics).map(([name, value]) => [name, expect.closeTo(value, 5)])),
      )
      const own = gradientsOf(pipeline.parameters)
      expect(own).toEqual(allNear(partOf(gradients, pipeline)))
      for (const name of Object.keys(own)) trained.add(name)
      // The others are of other ranks.
      const others = Object.entries(gradientsOf(namedParameters(model))).filter(([name]) => !(name in own))
      expect(others.filter(([, values]) => values !== null)).toEqual([])
      await ranks.barrier()
      held.push(backend.stats().handles)
      await ranks.barrier()
    }
  })
  expect([...trained].sort()).toEqual(Object.keys(gradients).sort())
  expect(new Set(held).size).toBe(1)
}

describe('a step in stages has loss, metrics, gradients and norm of the whole model, and leaves nothing behind', () => {
  test.each(named)('%s', (_, schedule) => expectWhole(schedule, newModel, 2))

  // Micro-batches count different numbers of positions, and so do the pipelines.
  test.each([
    ['two of 1F1B', oneForwardOneBackward(2, 3), 2],
    ['three of one rank', oneForwardOneBackward(1, 1), 3],
    ['two of DualPipe', dualPipe(2, 4), 2],
    ['two of DualPipeV', dualPipeV(2, 4), 2],
  ] as const)('several pipelines: %s', (_, schedule, replicas) => expectWhole(schedule, newModel, 2, { replicas }))

  test.each<[string, PipelineSchedule, number, number, Changes?]>([
    ['1F1B', oneForwardOneBackward(2, 3), 2, 2],
    ['one stage, a rank for each expert', oneForwardOneBackward(1, 2), 4, 4],
    ['a rank for every layer', oneForwardOneBackward(11, 2), 2, 2],
    ['ZB-H1', zeroBubbleH1(2, 3), 2, 2],
    ['ZB-V', zeroBubbleV(2, 3), 2, 2],
    ['DualPipe', dualPipe(2, 4), 2, 2],
    ['DualPipeV', dualPipeV(2, 4), 2, 2],
    ['DualPipeV on one rank', dualPipeV(1, 3), 2, 2],
    ['twice two of ZB-H1', zeroBubbleH1(2, 2), 4, 2],
  ])('pipelines that share experts out: %s', (_, schedule, replicas, expertParallelSize) =>
    expectWhole(schedule, newModel, 2, { replicas, expertParallelSize }),
  )

  test.each<[string, Changes, DeepSeekOptions]>([
    ['embedding and head are one', { tie_word_embeddings: true }, {}],
    ['weights in int8, beside which the others are trained', {}, { weights: 'int8' }],
    ['MTP with embeddings and heads of its own', { mtp_separate_embeddings: true }, {}],
    ['MTP trained alone', {}, { objective: { mtpDetached: true } }],
    ['no MTP', { num_nextn_predict_layers: 0 }, {}],
    ['dense', { n_routed_experts: null, num_experts_per_tok: null, n_group: null, topk_group: null }, {}],
    ['a balancer', {}, { balancer: combineBalancers(auxFree({ speed: 0.01 }), sequenceWise({ alpha: 0.01 })) }],
    ['tokens are dropped', {}, { dropping: { devices: 2, undropped: 0.5 } }],
    ['layers are recomputed', {}, { recompute: 'layers' }],
    ['parts of layers are recomputed', {}, { recompute: 'selective' }],
  ])('%s', async (_, changes, options) => {
    for (const schedule of [oneForwardOneBackward(3, 4), zeroBubbleH1(2, 3), dualPipe(2, 4), dualPipeV(2, 4)])
      await expectWhole(schedule, () => newModel(changes, options))
    // Experts in fewer bits cannot be taken apart.
    if (options.weights === undefined)
      await expectWhole(dualPipeV(2, 4), () => newModel(changes, options), 1, { replicas: 2, expertParallelSize: 2 })
  })
})

test('steps with sharded experts leak no tensors, and dispose() frees the experts', async () => {
  const schedule = dualPipeV(2, 4)
  await expectWhole(schedule, newModel, 3, { replicas: 4, expertParallelSize: 2 })
  const own = referenceBackend()
  await local(4, async ranks => {
    const model = newModel({}, { backend: own })
    const pipeline = new Pipeline(model, schedule, ranks, { expertParallelSize: 2 })
    await pipeline.step(batchesOf(4, model))
    await pipeline.gather()
    await pipeline.step(batchesOf(4, model))
    for (const { parameter } of pipeline.parameters) parameter.zeroGrad()
    pipeline.dispose()
    model.dispose()
  })
  expect(own.stats().handles).toBe(0)
})

test('loads of all stages move the selection biases, and every rank is told', async () => {
  const schedule = dualPipe(4, 8)
  const whole = newModel()
  wholeStep(whole, 8)
  const told = await whole.afterStep()
  await local(4, async ranks => {
    const model = newModel()
    const pipeline = new Pipeline(model, schedule, ranks)
    await pipeline.step(batchesOf(8, model))
    expect(await model.afterStep(loads => ranks.allReduce(loads))).toEqual(told)
    const expected = weightsOf(namedParameters(whole))
    // The others are freed, but for selection biases, which move everywhere.
    const isHere = ({ name, parameter }: NamedParameter) =>
      pipeline.parameters.some(own => own.parameter === parameter) || name.endsWith('e_score_correction_bias')
    for (const named of namedParameters(model)) {
      if (isHere(named)) expect(weightsOf([named])[named.name]).toEqual(near(expected[named.name]))
      else expect(() => named.parameter.neg()).toThrow(/freed/)
    }
    await pipeline.gather()
    expect(weightsOf(namedParameters(model))).toEqual(allNear(expected))
  })
  expect(told['maxVio']).toBeGreaterThan(0)
})

test.each([
  ['1F1B', oneForwardOneBackward(3, 4), 1],
  ['DualPipe', dualPipe(2, 4), 1],
  ['1F1B, experts shared out', oneForwardOneBackward(2, 2), 2],
  ['DualPipe, experts shared out', dualPipe(2, 4), 2],
] as const)(
  'steps of AdamW by %s: after gather all ranks have the weights of one',
  async (_, schedule, expertParallelSize) => {
    const steps = 4
    const world = expertParallelSize
    const microBatches = world * schedule.microBatches
    const take = (optimizer: AdamW, gradNorm: number) =>
      scope(() => optimizer.step(1e-3, full([], Math.min(1, 1 / gradNorm))))
    const whole = newModel()
    const all = namedParameters(whole)
    const alone = new AdamW(all)
    const told: unknown[] = []
    for (let step = 0; step < steps; step++) {
      take(alone, wholeStep(whole, microBatches).gradNorm)
      for (const { parameter } of all) parameter.zeroGrad()
      told.push(await whole.afterStep())
    }
    const expected = allNear(weightsOf(all))
    const next = wholeStep(whole, microBatches).loss
    await local(world * schedule.ranks.length, async ranks => {
      const model = newModel()
      const pipeline = new Pipeline(model, schedule, ranks, { expertParallelSize })
      const optimizer = new AdamW(pipeline.parameters)
      const batches = batchesOf(microBatches, model).filter((_, m) => m % world === pipeline.dataShard.rank)
      for (let step = 0; step < steps; step++) {
        take(optimizer, (await pipeline.step(batches)).gradNorm)
        expect(await model.afterStep(loads => ranks.allReduce(loads))).toEqual(told[step])
      }
      await pipeline.gather()
      expect(weightsOf(namedParameters(model))).toEqual(expected)
      // The next step takes from the model what this rank trains.
      expect((await pipeline.step(batches)).loss).toBeCloseTo(next, 5)
      pipeline.dispose()
      model.dispose()
    })
  },
)

test.each([
  ['1F1B', oneForwardOneBackward(3, 4)],
  ['DualPipe', dualPipe(2, 4)],
] as const)('%s: what several ranks have keeps the same bits', async (_, schedule) => {
  const cpu = await createBackend()
  setDefaultBackend(cpu)
  const ranks = await local(schedule.ranks.length, async ranks => {
    const model = newModel()
    const pipeline = new Pipeline(model, schedule, ranks)
    const optimizer = new AdamW(pipeline.parameters)
    for (let step = 0; step < 3; step++) {
      const { gradNorm } = await pipeline.step(batchesOf(4, model))
      scope(() => optimizer.step(1e-2, full([], Math.min(1, 1 / gradNorm))))
    }
    const values = pipeline.parameters.map(async ({ name, parameter }) => [name, await parameter.values()] as const)
    return new Map(await Promise.all(values))
  })
  const embeddings = ranks.flatMap(own => own.get('model.embed_tokens.weight') ?? [])
  expect(embeddings).toHaveLength(2)
  for (const own of ranks)
    for (const [name, values] of own)
      for (const other of ranks) if (other.has(name)) expect(other.get(name)).toEqual(values)
  cpu.dispose()
})

test('all ranks reject a step with a loss that is not finite', async () => {
  const refusals = await local(2, async ranks => {
    const model = newModel()
    const pipeline = new Pipeline(model, zeroBubbleH1(2, 2), ranks)
    if (ranks.rank === 0) model.model.embed_tokens.weight.assign(full([20, 8], Number.NaN))
    return pipeline.step(batchesOf(2, model)).then(String, error => `${error.code} ${error.message}`)
  })
  for (const refusal of refusals) expect(refusal).toMatch(/^E_NAN .*the step has loss NaN/)
})

test('a step with another number of micro-batches than the schedule, or with micro-batches of different sizes, is an error', async () => {
  await local(1, async ranks => {
    const model = newModel()
    const pipeline = new Pipeline(model, oneForwardOneBackward(1, 2), ranks)
    await expect(pipeline.step(batchesOf(3, model))).rejects.toThrow(/expected 2 micro-batches, got 3/)
    const [batch] = batchesOf(1, model)
    const half = { ...batch, rows: 1, tokens: batch.tokens.slice(0, 7), documents: batch.documents.slice(0, 7) }
    await expect(pipeline.step([batch, half])).rejects.toThrow(/micro-batches have different shapes: \[2,7\] \[1,7\]/)
  })
})

test.each([2, 4])('%i ranks reject a step if their micro-batches differ, and can take the next one', async size => {
  const schedule = zeroBubbleH1(2, 4)
  const found = await local(size, async ranks => {
    const model = newModel()
    const pipeline = new Pipeline(model, schedule, ranks)
    const own = batchesOf(8, model)
    // Those of the last two.
    const first = ranks.rank === size - 1 ? 4 : 0
    const refusal = await pipeline.step(own.slice(first, first + 4)).then(String, String)
    const { loss } = await pipeline.step(own.slice(0, 4))
    return [refusal, loss] as const
  })
  for (const [refusal, loss] of found) {
    expect(refusal).toMatch(/ZB-H1: the ranks of a pipeline have different micro-batches; use the same seed/)
    expect(loss).toBeCloseTo(wholeStep(newModel(), 4).loss, 5)
  }
})

test('an invalid model, schedule, communicator, option or list of micro-batches is an error', async () => {
  const schedule = oneForwardOneBackward(1, 2)
  await local(1, async ranks => {
    const make = (...given: unknown[]) => {
      const [model, plan, communicator] = given.map((value, i) => value ?? [newModel(), schedule, ranks][i])
      return () => new Pipeline(model as DeepSeek, plan as PipelineSchedule, communicator as Communicator)
    }
    const all = [null, null, null]
    expect(make(...all.with(0, {} as never))).toThrow('Pipeline: the model has no inStages()')
    for (const wrong of ['1F1B', oneForwardOneBackward]) {
      expect(make(...all.with(1, wrong as never))).toThrow('checkSchedule: not a schedule')
    }
    expect(make(...all.with(1, zeroBubbleH1(2, 2) as never))).toThrow('ZB-H1: the schedule is for 2 ranks, got 1')
    expect(make(...all.with(2, Promise.resolve(ranks) as never))).toThrow('Pipeline: ranks is a promise')
    expect(make(...all.with(2, {} as never))).toThrow(
      'Pipeline: ranks is not a communicator; pass the result of await mpi()',
    )
    const pipeline = make(...all)()
    await expect(pipeline.step(undefined as never)).rejects.toThrow('1F1B: the micro-batches are not an array')
    const [batch] = batchesOf(1, newModel())
    await expect(pipeline.step(batch as never)).rejects.toThrow('1F1B: the micro-batches are not an array')
    const misspelt = pipeline.step([batch, batch], { precison: 'bf16' } as object)
    await expect(misspelt).rejects.toThrow('unknown option precison; did you mean precision?')
  })
  for (const expertParallelSize of [0, 1.5, 3]) {
    const refused = local(4, async ranks => new Pipeline(newModel(), schedule, ranks, { expertParallelSize }))
    await expect(refused).rejects.toThrow(
      `expertParallelSize is ${expertParallelSize}, but 4 ranks have the same layers`,
    )
  }
  await local(2, async ranks => {
    const whole = newModel()
    const cut = { inStages: (stages: number) => whole.inStages(stages) }
    const make = (options: object) => () => new Pipeline(cut, schedule, ranks, options)
    expect(make({ expertParallelSize: 2 })).toThrow('the model has no moeLayers; leave out expertParallelSize')
    expect(make({ expertParalelSize: 2 })).toThrow('did you mean expertParallelSize?')
  })
  // The rank that is not in the schedule gets the same error.
  const refusals = await local(3, async ranks => {
    try {
      return String(new Pipeline(newModel(), zeroBubbleH1(2, 2), ranks))
    } catch (error) {
      return String(error)
    }
  })
  for (const refusal of refusals) expect(refusal).toContain('the schedule is for 2 ranks, got 3')
})
