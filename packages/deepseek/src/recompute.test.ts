/** @file With recomputation, results stay bit-identical and loads are counted once. `@moe/parallel` tests it with pipeline and expert parallelism. */
import {
  addAdapters,
  type Backend,
  backward,
  checkpoint,
  fromHost,
  namedParameters,
  scope,
  setDefaultBackend,
  withPrecision,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { auxFree, combineBalancers, sequenceWise } from '@moe/router'
import { beforeEach, describe, expect, test } from 'vitest'
import { DeepSeek, type DeepSeekConfigInput, type DeepSeekOptions, type Recompute } from './index.ts'
import { tiny } from './test-tiny.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

const config = { ...tiny, num_hidden_layers: 3, first_k_dense_replace: 1, num_nextn_predict_layers: 2 }
const choices: readonly Recompute[] = ['selective', 'layers', { every: 2 }]
const rows = {
  tokens: Int32Array.from({ length: 20 }, (_, i) => (5 * i + i * i) % 40),
  documents: Int32Array.from({ length: 20 }, (_, i) => (i > 16 ? -1 : i >> 3)),
  // From position 4 on, tokens do not attend to positions before it.
  starts: Int32Array.from({ length: 20 }, (_, i) => (i % 10 < 4 ? 0 : 4)),
  rows: 2,
  length: 10,
}

const bits = (values: ArrayLike<number> | undefined) => values && Array.from(values)

/** Loss, metrics, gradients and loads of two micro-batches, the bytes that they use between forward and backward pass, and the handles left afterwards. */
async function runStep(model: DeepSeek) {
  const before = backend.stats()
  let activationBytes = 0
  const tensors = scope(() =>
    [rows, { ...rows, tokens: rows.tokens.map(token => (token * 7) % 40) }].map(batch => {
      const { loss, nll, metrics } = model.loss(batch)
      activationBytes = backend.stats().bytes - before.bytes
      const found = [loss, nll, ...Object.values(metrics)].map(tensor => tensor.detach())
      backward(loss)
      return found
    }),
  )
  const values = await Promise.all(tensors.flat().map(tensor => tensor.item()))
  const gradients: Record<string, number[] | undefined> = {}
  for (const { name, parameter } of namedParameters(model)) {
    gradients[name] = bits(await parameter.grad?.values())
    parameter.zeroGrad()
  }
  const loads = await Promise.all(model.moeLayers.map(async ({ load }) => bits(await load?.values())))
  const after = await model.afterStep()
  for (const tensor of tensors.flat()) tensor.dispose()
  return {
    results: { values, gradients, loads, after },
    activationBytes,
    leaked: backend.stats().handles - before.handles,
  }
}

describe('loss, metrics, gradients and loads equal those without recomputation', () => {
  test.each<[string, Partial<DeepSeekConfigInput>, DeepSeekOptions, ((model: DeepSeek) => void)?]>([
    ['default options', {}, {}],
    ['uncompressed queries, tied embedding and head', { q_lora_rank: null, tie_word_embeddings: true }, {}],
    ['MTP detached from the main model', {}, { objective: { mtpDetached: true } }],
    ['a balancer', {}, { balancer: combineBalancers(auxFree({ speed: 0.01 }), sequenceWise({ alpha: 0.01 })) }],
    ['token dropping', {}, { dropping: { devices: 2, undropped: 0.5 } }],
    ['frozen int8 weights', {}, { weights: 'int8' }],
    ['adapters', {}, {}, model => addAdapters(model, { rank: 2 })],
    [
      'a dense model with multi-head attention',
      { model_type: 'llama', n_routed_experts: null, num_experts_per_tok: null, num_nextn_predict_layers: 0 } as never,
      {},
    ],
  ])('%s', async (_, changes, options, prepare) => {
    const make = (recompute?: Recompute) => {
      const model = new DeepSeek({ ...config, ...changes } as DeepSeekConfigInput, { ...options, seed: 1, recompute })
      prepare?.(model)
      return model
    }
    const plain = await runStep(make())
    for (const choice of choices) {
      const { results, activationBytes } = await runStep(make(choice))
      expect(results, JSON.stringify(choice)).toEqual(plain.results)
      expect(activationBytes, JSON.stringify(choice)).toBeLessThan(plain.activationBytes)
    }
  })

  test('in bf16, also if the backward pass runs outside withPrecision', async () => {
    const run = async (recompute?: Recompute) => {
      const model = new DeepSeek(config, { seed: 1, recompute })
      scope(() => {
        const loss = withPrecision('bf16', () => checkpoint(() => model.loss(rows).loss))
        backward(loss)
      })
      return Promise.all(namedParameters(model).map(async ({ parameter }) => bits(await parameter.grad?.values())))
    }
    const plain = await run()
    for (const choice of choices) expect(await run(choice), JSON.stringify(choice)).toEqual(plain)
  })
})

test('recomputing every layer takes the least memory, every second layer more, and nothing is leaked', async () => {
  const memory: number[] = []
  for (const recompute of ['layers', { every: 2 }, undefined] as const) {
    const model = new DeepSeek(config, { seed: 1, recompute })
    await runStep(model)
    const second = await runStep(model)
    expect(second.leaked).toBe(0)
    memory.push(second.activationBytes)
  }
  expect(memory).toEqual([...memory].sort((a, b) => a - b))
  expect(memory[0]).toBeLessThan((2 / 3) * memory[2])
})

test('a staged loss gives the same loss and loads as without recomputation', async () => {
  const run = async (recompute?: Recompute) => {
    const model = new DeepSeek(config, { seed: 1, recompute })
    const { staged } = model
    if (staged === undefined) throw new Error('not staged')
    const { arrays } = staged.inputs(rows)
    const { loss, carried } = scope(() => {
      const inputs = Object.fromEntries(
        Object.entries({ ...arrays, ...staged.stepInputs().arrays }).map(([name, { data, shape }]) => [
          name,
          fromHost(data, shape, data instanceof Int32Array ? 'i32' : 'f32', backend),
        ]),
      )
      const { loss, carried } = staged.loss(inputs)
      const value = loss.detach()
      backward(loss)
      return { loss: value, carried: [...carried] }
    })
    return [await loss.item(), bits(await carried[0].values()), model.moeLayers.map(({ load }) => load)]
  }
  const plain = await run()
  for (const choice of choices) expect(await run(choice)).toEqual(plain)
})

test('invalid recompute options are rejected', () => {
  for (const recompute of ['all', { every: 0 }, { every: 1.5 }, {}, null, 2])
    expect(() => new DeepSeek(config, { recompute: recompute as never })).toThrow(
      expect.objectContaining({ code: 'E_CONFIG', message: expect.stringContaining('recompute is') }),
    )
})
