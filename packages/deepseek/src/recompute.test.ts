/** @file Whatever is recomputed, numbers stay the same to the last bit, and loads are counted once. In pipelines and with experts on several ranks: `@moe/parallel`. */
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
  // From the fourth place on, tokens do not see those before it.
  starts: Int32Array.from({ length: 20 }, (_, i) => (i % 10 < 4 ? 0 : 4)),
  rows: 2,
  length: 10,
}

const bits = (values: ArrayLike<number> | undefined) => values && Array.from(values)

/** Loss, metrics, gradients and loads of two micro-batches, what they hold between the ways there and back, and what is left of them. */
async function numbersOf(model: DeepSeek) {
  const before = backend.stats()
  let held = 0
  const numbers = scope(() =>
    [rows, { ...rows, tokens: rows.tokens.map(token => (token * 7) % 40) }].map(batch => {
      const { loss, nll, metrics } = model.loss(batch)
      held = backend.stats().bytes - before.bytes
      const found = [loss, nll, ...Object.values(metrics)].map(tensor => tensor.detach())
      backward(loss)
      return found
    }),
  )
  const values = await Promise.all(numbers.flat().map(tensor => tensor.item()))
  const gradients: Record<string, number[] | undefined> = {}
  for (const { name, parameter } of namedParameters(model)) {
    gradients[name] = bits(await parameter.grad?.values())
    parameter.zeroGrad()
  }
  const loads = await Promise.all(model.moeLayers.map(async ({ load }) => bits(await load?.values())))
  const after = await model.afterStep()
  for (const tensor of numbers.flat()) tensor.dispose()
  return { numbers: { values, gradients, loads, after }, held, left: backend.stats().handles - before.handles }
}

describe('loss, metrics, gradients and loads equal those without recomputation', () => {
  test.each<[string, Partial<DeepSeekConfigInput>, DeepSeekOptions, ((model: DeepSeek) => void)?]>([
    ['usual', {}, {}],
    [
      'keys of queries are not compressed, embedding and head are one',
      { q_lora_rank: null, tie_word_embeddings: true },
      {},
    ],
    ['MTP trained alone', {}, { objective: { mtpDetached: true } }],
    ['a balancer', {}, { balancer: combineBalancers(auxFree({ speed: 0.01 }), sequenceWise({ alpha: 0.01 })) }],
    ['tokens are dropped', {}, { dropping: { devices: 2, undropped: 0.5 } }],
    ['weights in int8, beside which the others are trained', {}, { weights: 'int8' }],
    ['adapters', {}, {}, model => addAdapters(model, { rank: 2 })],
    [
      'dense, multi-head attention',
      { model_type: 'llama', n_routed_experts: null, num_experts_per_tok: null, num_nextn_predict_layers: 0 } as never,
      {},
    ],
  ])('%s', async (_, changes, options, prepare) => {
    const make = (recompute?: Recompute) => {
      const model = new DeepSeek({ ...config, ...changes } as DeepSeekConfigInput, { ...options, seed: 1, recompute })
      prepare?.(model)
      return model
    }
    const kept = await numbersOf(make())
    for (const choice of choices) {
      const { numbers, held } = await numbersOf(make(choice))
      expect(numbers, JSON.stringify(choice)).toEqual(kept.numbers)
      expect(held, JSON.stringify(choice)).toBeLessThan(kept.held)
    }
  })

  test('also in bf16, whatever the precision of the backward pass', async () => {
    const run = async (recompute?: Recompute) => {
      const model = new DeepSeek(config, { seed: 1, recompute })
      scope(() => {
        const loss = withPrecision('bf16', () => checkpoint(() => model.loss(rows).loss))
        backward(loss)
      })
      return Promise.all(namedParameters(model).map(async ({ parameter }) => bits(await parameter.grad?.values())))
    }
    const kept = await run()
    for (const choice of choices) expect(await run(choice), JSON.stringify(choice)).toEqual(kept)
  })
})

test('recomputing every layer keeps the least, every second layer more, and nothing remains after a step', async () => {
  const held: number[] = []
  for (const recompute of ['layers', { every: 2 }, undefined] as const) {
    const model = new DeepSeek(config, { seed: 1, recompute })
    await numbersOf(model)
    const second = await numbersOf(model)
    expect(second.left).toBe(0)
    held.push(second.held)
  }
  expect(held).toEqual([...held].sort((a, b) => a - b))
  expect(held[0]).toBeLessThan((2 / 3) * held[2])
})

test('a staged loss has the same ops as without recomputation, and carries loads', async () => {
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
      const shown = loss.detach()
      backward(loss)
      return { loss: shown, carried: [...carried] }
    })
    return [await loss.item(), bits(await carried[0].values()), model.moeLayers.map(({ load }) => load)]
  }
  const kept = await run()
  for (const choice of choices) expect(await run(choice)).toEqual(kept)
})

test('invalid recompute options are rejected', () => {
  for (const recompute of ['all', { every: 0 }, { every: 1.5 }, {}, null, 2])
    expect(() => new DeepSeek(config, { recompute: recompute as never })).toThrow(
      expect.objectContaining({ code: 'E_CONFIG', message: expect.stringContaining('recompute is') }),
    )
})
