/** @file Pipeline parallelism of a DeepSeek model with every schedule, compared with the same model on one rank. */
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
import { batchesOf, type Changes, gradientsOf, newModel, stepOnOneRank, weightsOf } from '../test-steps.ts'
import { Pipeline } from './pipeline.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

const schedules: PipelineSchedule[] = [
  oneForwardOneBackward(1, 2),
  oneForwardOneBackward(4, 6),
  // One stage for each layer, the head and each MTP module.
  oneForwardOneBackward(11, 3),
  interleaved(2, 4, 2),
  zeroBubbleH1(4, 6),
  zeroBubbleH2(2, 4),
  zeroBubbleV(2, 4),
  dualPipe(4, 8),
  dualPipeV(2, 5),
]
const named = schedules.map(schedule => [`${schedule.name}, ${schedule.ranks.length} ranks`, schedule] as const)

/** Attention to two of four keys, by the indexers of four layers of eight. */
const sharing: Changes = {
  model_type: 'glm_moe_dsa',
  index_topk: 2,
  index_n_heads: 3,
  index_head_dim: 4,
  index_topk_pattern: 'FFSSFSSF',
}

// Sums are in another order, and messages between ranks are rounded to f32.
const near = (numbers: readonly number[] | null) => numbers?.map(x => expect.closeTo(x, 5)) ?? null
const allNear = (numbers: Readonly<Record<string, number[] | null>>) =>
  Object.fromEntries(Object.entries(numbers).map(([name, values]) => [name, near(values)]))

/** The part of the complete model's values that belongs to this rank. */
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

interface Replication {
  /** The number of pipelines. */
  readonly replicas?: number
  /** The number of pipelines over which experts are sharded. */
  readonly expertParallelSize?: number
}

/** Expects the results of a step on one rank from each of `rounds` steps of the pipelines. */
async function expectStepOfOneRank(
  schedule: PipelineSchedule,
  make: () => DeepSeek,
  rounds = 1,
  { replicas = 1, expertParallelSize = 1 }: Replication = {},
): Promise<void> {
  const microBatches = replicas * schedule.microBatches
  const { loss, metrics, gradients, gradNorm } = stepOnOneRank(make(), microBatches)
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
      // This rank has gradients of no other parameters.
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

describe('a pipelined step gives the loss, metrics, gradients and gradient norm of one rank, and leaks no tensors', () => {
  test.each(named)('%s', (_, schedule) => expectStepOfOneRank(schedule, newModel, 2))

  // The numbers of positions with a loss differ between micro-batches, and between pipelines.
  test.each([
    ['two with 1F1B', oneForwardOneBackward(2, 3), 2],
    ['three of one rank each', oneForwardOneBackward(1, 1), 3],
    ['two with DualPipe', dualPipe(2, 4), 2],
    ['two with DualPipeV', dualPipeV(2, 4), 2],
  ] as const)('with several pipelines: %s', (_, schedule, replicas) =>
    expectStepOfOneRank(schedule, newModel, 2, { replicas }),
  )

  test.each<[string, PipelineSchedule, number, number, Changes?]>([
    ['1F1B', oneForwardOneBackward(2, 3), 2, 2],
    ['one stage, one rank per expert', oneForwardOneBackward(1, 2), 4, 4],
    ['one rank per layer', oneForwardOneBackward(11, 2), 2, 2],
    ['ZB-H1', zeroBubbleH1(2, 3), 2, 2],
    ['ZB-V', zeroBubbleV(2, 3), 2, 2],
    ['DualPipe', dualPipe(2, 4), 2, 2],
    ['DualPipeV', dualPipeV(2, 4), 2, 2],
    ['DualPipeV on one rank', dualPipeV(1, 3), 2, 2],
    ['ZB-H1, four pipelines in two pairs', zeroBubbleH1(2, 2), 4, 2],
  ])('with experts sharded over pipelines: %s', (_, schedule, replicas, expertParallelSize) =>
    expectStepOfOneRank(schedule, newModel, 2, { replicas, expertParallelSize }),
  )

  test.each<[string, Changes, DeepSeekOptions]>([
    ['tied embedding and head', { tie_word_embeddings: true }, {}],
    ['frozen int8 weights', {}, { weights: 'int8' }],
    ['MTP with separate embeddings and heads', { mtp_separate_embeddings: true }, {}],
    ['MTP detached from the main model', {}, { objective: { mtpDetached: true } }],
    ['without MTP', { num_nextn_predict_layers: 0 }, {}],
    ['without experts', { n_routed_experts: null, num_experts_per_tok: null, n_group: null, topk_group: null }, {}],
    ['with a balancer', {}, { balancer: combineBalancers(auxFree({ speed: 0.01 }), sequenceWise({ alpha: 0.01 })) }],
    ['with token dropping', {}, { dropping: { devices: 2, undropped: 0.5 } }],
    ['with recomputation of layers', {}, { recompute: 'layers' }],
    ['with selective recomputation', {}, { recompute: 'selective' }],
    ['layers that share indexers', sharing, {}],
    ['layers that share indexers, with recomputation', sharing, { recompute: 'layers' }],
  ])('%s', async (_, changes, options) => {
    for (const schedule of [oneForwardOneBackward(3, 4), zeroBubbleH1(2, 3), dualPipe(2, 4), dualPipeV(2, 4)])
      await expectStepOfOneRank(schedule, () => newModel(changes, options))
    // Quantized experts cannot be sharded.
    if (options.weights === undefined)
      await expectStepOfOneRank(dualPipeV(2, 4), () => newModel(changes, options), 1, {
        replicas: 2,
        expertParallelSize: 2,
      })
  })
})

test('steps with sharded experts leak no tensors, and dispose() frees the experts', async () => {
  const schedule = dualPipeV(2, 4)
  await expectStepOfOneRank(schedule, newModel, 3, { replicas: 4, expertParallelSize: 2 })
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

test('selection biases are updated from the loads of all stages, and every rank gets the same metrics', async () => {
  const schedule = dualPipe(4, 8)
  const whole = newModel()
  stepOnOneRank(whole, 8)
  const metrics = await whole.afterStep()
  await local(4, async ranks => {
    const model = newModel()
    const pipeline = new Pipeline(model, schedule, ranks)
    await pipeline.step(batchesOf(8, model))
    expect(await model.afterStep(loads => ranks.allReduce(loads))).toEqual(metrics)
    const expected = weightsOf(namedParameters(whole))
    // Parameters of other ranks are freed, except selection biases, which every rank updates.
    const isOnThisRank = ({ name, parameter }: NamedParameter) =>
      pipeline.parameters.some(own => own.parameter === parameter) || name.endsWith('e_score_correction_bias')
    for (const named of namedParameters(model)) {
      if (isOnThisRank(named)) expect(weightsOf([named])[named.name]).toEqual(near(expected[named.name]))
      else expect(() => named.parameter.neg()).toThrow(/freed/)
    }
    await pipeline.gather()
    expect(weightsOf(namedParameters(model))).toEqual(allNear(expected))
  })
  expect(metrics['maxVio']).toBeGreaterThan(0)
})

test.each([
  ['1F1B', oneForwardOneBackward(3, 4), 1],
  ['DualPipe', dualPipe(2, 4), 1],
  ['1F1B, sharded experts', oneForwardOneBackward(2, 2), 2],
  ['DualPipe, sharded experts', dualPipe(2, 4), 2],
] as const)(
  'after steps of AdamW and gather(), all ranks have the weights of a training on one rank: %s',
  async (_, schedule, expertParallelSize) => {
    const steps = 4
    const world = expertParallelSize
    const microBatches = world * schedule.microBatches
    const take = (optimizer: AdamW, gradNorm: number) =>
      scope(() => optimizer.step(1e-3, full([], Math.min(1, 1 / gradNorm))))
    const whole = newModel()
    const all = namedParameters(whole)
    const alone = new AdamW(all)
    const metrics: unknown[] = []
    for (let step = 0; step < steps; step++) {
      take(alone, stepOnOneRank(whole, microBatches).gradNorm)
      for (const { parameter } of all) parameter.zeroGrad()
      metrics.push(await whole.afterStep())
    }
    const expected = allNear(weightsOf(all))
    const next = stepOnOneRank(whole, microBatches).loss
    await local(world * schedule.ranks.length, async ranks => {
      const model = newModel()
      const pipeline = new Pipeline(model, schedule, ranks, { expertParallelSize })
      const optimizer = new AdamW(pipeline.parameters)
      const batches = batchesOf(microBatches, model).filter((_, m) => m % world === pipeline.dataShard.rank)
      for (let step = 0; step < steps; step++) {
        take(optimizer, (await pipeline.step(batches)).gradNorm)
        expect(await model.afterStep(loads => ranks.allReduce(loads))).toEqual(metrics[step])
      }
      await pipeline.gather()
      expect(weightsOf(namedParameters(model))).toEqual(expected)
      // The next step uses this rank's parameters of the gathered model.
      expect((await pipeline.step(batches)).loss).toBeCloseTo(next, 5)
      pipeline.dispose()
      model.dispose()
    })
  },
)

test.each([
  ['1F1B', oneForwardOneBackward(3, 4)],
  ['DualPipe', dualPipe(2, 4)],
] as const)('%s: parameters that several ranks have stay bit-identical', async (_, schedule) => {
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

test('a step with a wrong number of micro-batches, or with micro-batches of different shapes, is an error', async () => {
  await local(1, async ranks => {
    const model = newModel()
    const pipeline = new Pipeline(model, oneForwardOneBackward(1, 2), ranks)
    await expect(pipeline.step(batchesOf(3, model))).rejects.toThrow(/expected 2 micro-batches, got 3/)
    const [batch] = batchesOf(1, model)
    const half = { ...batch, rows: 1, tokens: batch.tokens.slice(0, 7), documents: batch.documents.slice(0, 7) }
    await expect(pipeline.step([batch, half])).rejects.toThrow(/micro-batches have different shapes: \[2,7\] \[1,7\]/)
  })
})

test.each([2, 4])(
  'all of %i ranks reject a step with different micro-batches, and continue with the next step',
  async size => {
    const schedule = zeroBubbleH1(2, 4)
    const found = await local(size, async ranks => {
      const model = newModel()
      const pipeline = new Pipeline(model, schedule, ranks)
      const own = batchesOf(8, model)
      // The last rank gets other micro-batches.
      const first = ranks.rank === size - 1 ? 4 : 0
      const refusal = await pipeline.step(own.slice(first, first + 4)).then(String, String)
      const { loss } = await pipeline.step(own.slice(0, 4))
      return [refusal, loss] as const
    })
    for (const [refusal, loss] of found) {
      expect(refusal).toMatch(/ZB-H1: the ranks of a pipeline have different micro-batches; use the same seed/)
      expect(loss).toBeCloseTo(stepOnOneRank(newModel(), 4).loss, 5)
    }
  },
)

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
