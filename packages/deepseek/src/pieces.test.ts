/** @file The loss in pieces is the loss. On several ranks: `@moe/parallel`. */
import { backward, dispatchPlan, namedParameters, setDefaultBackend, type Tensor } from '@moe/core'
import { readF64, referenceBackend } from '@moe/core/reference'
import { expect, test } from 'vitest'
import { DeepSeek, type PieceRunner } from './index.ts'
import { tiny } from './test-tiny.ts'

const rows = {
  tokens: Int32Array.from({ length: 16 }, (_, i) => (5 * i + i * i) % 40),
  documents: Int32Array.from({ length: 16 }, (_, i) => (i > 12 ? -1 : i >> 3)),
  rows: 2,
  length: 8,
}

test('pieces that are not cut apart have loss, metrics and gradients of the model, and ask for every layer with experts in turn', async () => {
  setDefaultBackend(referenceBackend())
  const make = () =>
    new DeepSeek({ ...tiny, num_hidden_layers: 3, first_k_dense_replace: 1, num_nextn_predict_layers: 2 })
  const [whole, model] = [make(), make()]
  const expected = whole.loss(rows)
  const together: PieceRunner = { piece: (inputs, fn) => [...fn(...inputs)], run: fn => fn() }
  const asked: number[] = []
  const pieces = model.inPieces(rows)
  const { loss, metrics } = await pieces.forward(together, async (layer, { x, weights, indices }) => {
    asked.push(layer)
    return model.moeLayers[layer].experts.route(x, weights, dispatchPlan(indices, 8))
  })
  const number = (tensor: Tensor) => readF64(tensor)[0]
  expect(asked).toEqual([0, 1, 2, 3])
  expect(pieces.count).toBe(expected.count)
  expect(number(loss)).toBeCloseTo(number(expected.loss), 12)
  expect(Object.keys(metrics).sort()).toEqual(['balance', 'mtp', 'nll'])
  for (const name of ['balance', 'mtp']) expect(number(metrics[name])).toBeCloseTo(number(expected.metrics[name]), 12)
  expect(number(metrics['nll'])).toBeCloseTo(number(expected.nll) * Math.fround(1 / pieces.count), 12)
  backward(loss)
  backward(expected.loss)
  const gradients = (of: DeepSeek) =>
    namedParameters(of).map(({ name, parameter: { grad } }) => [name, grad && Array.from(readF64(grad))] as const)
  expect(gradients(model)).toEqual(
    gradients(whole).map(([name, values]) => [name, values?.map(value => expect.closeTo(value, 10)) ?? null]),
  )
})
