/** @file Expert parallelism of a DeepSeek model, compared with the same model on one rank. */
import { type Backend, fromHost, full, namedParameters, scope, setDefaultBackend, trainable } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import type { DeepSeek, DeepSeekOptions } from '@moe/deepseek'
import { auxFree, combineBalancers, sequenceWise } from '@moe/router'
import { AdamW, Muon, type Optimizer } from '@moe/trainer'
import { beforeEach, describe, expect, test } from 'vitest'
import type { Communicator } from '../communicator/communicator.ts'
import { local } from '../communicator/local.ts'
import { batchesOf, type Changes, gradientsOf, newModel, stepOnOneRank, weightsOf } from '../test-steps.ts'
import { ExpertParallel } from './expert-parallel.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

// Sums are in another order, and messages between ranks are rounded to f32.
const near = (numbers: readonly number[] | null) => numbers?.map(x => expect.closeTo(x, 5)) ?? null

/** The values of a parameter of the complete model that belong to a rank. */
const shardOf = (name: string, values: number[] | null, rank: number, size: number) => {
  if (values === null || !name.includes('.experts.')) return values
  return values.slice((rank * values.length) / size, ((rank + 1) * values.length) / size)
}

describe('a step gives the loss, metrics, gradients and gradient norm of one rank with all micro-batches, and leaks no tensors', () => {
  test.each<[string, number, number, Changes, DeepSeekOptions, number?]>([
    ['one rank', 1, 2, {}, {}],
    ['experts sharded over pairs of four ranks', 4, 1, {}, {}, 2],
    ['experts sharded over pairs of six ranks, several micro-batches per rank', 6, 2, {}, {}, 2],
    ['two ranks with all experts each', 2, 1, {}, {}, 1],
    [
      'a balancer, and experts sharded over pairs of four ranks',
      4,
      1,
      {},
      { balancer: combineBalancers(auxFree({ speed: 0.01 }), sequenceWise({ alpha: 0.01 })) },
      2,
    ],
    ['two ranks', 2, 2, {}, {}],
    ['one rank per expert', 4, 1, {}, {}],
    ['eight ranks, two shared experts', 8, 1, { n_routed_experts: 8, n_shared_experts: 2 }, {}],
    ['without shared experts and groups', 2, 1, { n_shared_experts: 0, n_group: null, topk_group: null }, {}],
    ['tied embedding and head', 2, 1, { tie_word_embeddings: true }, {}],
    ['MTP with separate embeddings and heads', 2, 1, { mtp_separate_embeddings: true }, {}],
    ['MTP detached from the main model', 2, 1, {}, { objective: { mtpDetached: true } }],
    ['without MTP', 2, 1, { num_nextn_predict_layers: 0 }, {}],
    [
      'without experts',
      2,
      1,
      { n_routed_experts: null, num_experts_per_tok: null, n_group: null, topk_group: null },
      {},
    ],
    ['a balancer', 2, 1, {}, { balancer: combineBalancers(auxFree({ speed: 0.01 }), sequenceWise({ alpha: 0.01 })) }],
    // Tokens are dropped per batch of a rank, with or without expert parallelism.
    ['with token dropping', 2, 1, {}, { dropping: { devices: 2, undropped: 0.5 } }],
    ['with recomputation of layers, except routed experts', 2, 2, {}, { recompute: 'layers' }],
    ['with selective recomputation', 2, 2, {}, { recompute: 'selective' }],
  ])('%s', async (_, size, each, changes, options, expertParallelSize = size) => {
    const make = () => newModel(changes, options)
    const { loss, metrics, gradients, gradNorm } = stepOnOneRank(make(), size * each)
    const handles: number[] = []
    await local(size, async ranks => {
      const model = make()
      const parallel = new ExpertParallel(model, ranks, { expertParallelSize })
      const batches = batchesOf(size * each, model).slice(ranks.rank * each, (ranks.rank + 1) * each)
      for (let round = 0; round < 2; round++) {
        const found = await parallel.step(batches)
        expect(found.loss).toBeCloseTo(loss, 5)
        expect(found.gradNorm).toBeCloseTo(gradNorm, 5)
        expect(found.metrics).toEqual(
          Object.fromEntries(Object.entries(metrics).map(([name, value]) => [name, expect.closeTo(value, 5)])),
        )
        const expected = Object.entries(gradients).map(([name, values]) => [
          name,
          near(shardOf(name, values, ranks.rank % expertParallelSize, expertParallelSize)),
        ])
        expect(gradientsOf(parallel.parameters)).toEqual(Object.fromEntries(expected))
        await ranks.barrier()
        handles.push(backend.stats().handles)
        await ranks.barrier()
      }
    })
    expect(new Set(handles).size).toBe(1)
  })
})

test.each<[string, (parameters: ConstructorParameters<typeof AdamW>[0]) => Optimizer, number]>([
  ['AdamW', parameters => new AdamW(parameters), 2],
  ['Muon', parameters => new Muon(parameters, { precision: 'f32' }), 2],
  ['AdamW, experts sharded over pairs of four ranks', parameters => new AdamW(parameters), 4],
])(
  'after steps and gather(), all ranks have the weights of a training on one rank: %s',
  async (_, optimizerOf, size) => {
    const steps = 4
    const take = (optimizer: Optimizer, gradNorm: number) =>
      scope(() => optimizer.step(1e-3, full([], Math.min(1, 1 / gradNorm))))
    const whole = newModel()
    const named = namedParameters(whole)
    const optimizer = optimizerOf(named)
    const metrics: unknown[] = []
    for (let step = 0; step < steps; step++) {
      const { gradNorm } = stepOnOneRank(whole, size)
      take(optimizer, gradNorm)
      for (const { parameter } of named) parameter.zeroGrad()
      metrics.push(await whole.afterStep())
    }
    const expected = weightsOf(named)
    await local(size, async ranks => {
      const model = newModel()
      const parallel = new ExpertParallel(model, ranks, { expertParallelSize: 2 })
      const shardOptimizer = optimizerOf(parallel.parameters)
      const [batch] = batchesOf(size, model).slice(ranks.rank)
      for (let step = 0; step < steps; step++) {
        take(shardOptimizer, (await parallel.step([batch])).gradNorm)
        expect(await model.afterStep(loads => ranks.allReduce(loads))).toEqual(metrics[step])
      }
      expect(() => model.forward(fromHost(Int32Array.of(1), [1, 1], 'i32'))).toThrow(/freed/)
      await parallel.gather()
      const gathered = Object.entries(expected).map(([name, values]) => [name, near(values)])
      expect(weightsOf(namedParameters(model))).toEqual(Object.fromEntries(gathered))
      await parallel.step([batch])
      expect(() => model.forward(fromHost(Int32Array.of(1), [1, 1], 'i32'))).toThrow(/freed/)
      parallel.dispose()
      model.dispose()
    })
  },
)

test('all ranks reject a step with unequal numbers of micro-batches, or with a loss that is not finite', async () => {
  const codes = await local(3, async ranks => {
    const model = newModel({ n_routed_experts: 6, n_group: null, topk_group: null })
    const parallel = new ExpertParallel(model, ranks)
    const refusal = (step: Promise<unknown>) => step.then(String, error => `${error.code} ${error.message}`)
    const none = await refusal(parallel.step([]))
    const uneven = await refusal(parallel.step(batchesOf(1 + ranks.rank, model)))
    if (ranks.rank === 1) model.model.norm.weight.assign(full([8], Number.NaN))
    return [uneven, await refusal(parallel.step(batchesOf(1, model))), none]
  })
  for (const [rank, [uneven, notFinite, none]] of codes.entries()) {
    expect(none).toMatch(
      /^E_CONFIG .*this rank has 0 micro-batches, all 3 ranks have 0 in total; pass the same number on every rank/,
    )
    expect(uneven).toMatch(
      new RegExp(`^E_CONFIG .*this rank has ${rank + 1} micro-batches, all 3 ranks have 6 in total`),
    )
    expect(notFinite).toMatch(/^E_NAN .*the step has loss NaN/)
  }
})

test('parameters keep their names, and the number of experts must be divisible by expertParallelSize', async () => {
  await local(2, async ranks => {
    const model = newModel()
    const { parameters } = new ExpertParallel(model, ranks)
    expect(parameters.map(({ name }) => name)).toEqual(namedParameters(model).map(({ name }) => name))
    const stack = parameters.find(({ slices }) => slices !== undefined)
    expect([stack?.parameter.shape[0], stack?.slices?.map(name => Number(name.match(/experts\.(\d+)/)?.[1]))]).toEqual([
      2,
      ranks.rank === 0 ? [0, 1] : [2, 3],
    ])
  })
  await expect(local(3, async ranks => new ExpertParallel(newModel(), ranks))).rejects.toThrow(
    /4 experts cannot be divided among 3 ranks/,
  )
  for (const expertParallelSize of [0, 1.5, 3, 8]) {
    const refused = local(4, async ranks => new ExpertParallel(newModel(), ranks, { expertParallelSize }))
    await expect(refused).rejects.toThrow(
      `expertParallelSize is ${expertParallelSize}, but 4 ranks have the same layers; pass a positive integer that divides 4`,
    )
  }
})

test('an invalid model, communicator, option or list of micro-batches is an error', async () => {
  await local(1, async ranks => {
    const make = (model: unknown, communicator: unknown) => {
      return () => new ExpertParallel(model as DeepSeek, communicator as Communicator)
    }
    expect(make({}, ranks)).toThrow('ExpertParallel: the model has no inPieces()')
    expect(make(newModel(), Promise.resolve(ranks))).toThrow('ExpertParallel: ranks is a promise')
    expect(make(newModel(), undefined)).toThrow(
      'ExpertParallel: ranks is not a communicator; pass the result of await mpi()',
    )
    const model = newModel()
    const [batch] = batchesOf(1, model)
    const parallel = make(model, ranks)()
    await expect(parallel.step(batch as never)).rejects.toThrow('the micro-batches are not an array; pass [batch]')
    await expect(parallel.step([batch], { precison: 'bf16' } as object)).rejects.toThrow(
      'unknown option precison; did you mean precision?',
    )
    expect(make(model, ranks)).toThrow('already freed')
    const frozen = newModel()
    for (const parameter of trainable(frozen)) parameter.trainable = false
    await expect(make(frozen, ranks)().step([batch])).rejects.toThrow('all parameters are frozen; set trainable')
  })
})
