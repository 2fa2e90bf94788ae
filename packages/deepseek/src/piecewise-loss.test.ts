/** @file The loss computed in pieces, on one rank. `@moe/parallel` tests it on several ranks. */
import { backward, namedParameters, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { expect, test } from 'vitest'
import { DeepSeek } from './index.ts'
import { routeWithin, together } from './test-pieces.ts'
import { tiny } from './test-tiny.ts'

const rows = {
  tokens: Int32Array.from({ length: 16 }, (_, i) => (5 * i + i * i) % 40),
  documents: Int32Array.from({ length: 16 }, (_, i) => (i > 12 ? -1 : i >> 3)),
  // From position 4 on, tokens do not attend to positions before it.
  starts: Int32Array.from({ length: 16 }, (_, i) => (i % 8 < 4 ? 0 : 4)),
  rows: 2,
  length: 8,
}

const weights = Float32Array.from({ length: 16 }, (_, i) => Math.sin(i) * 2)

test.each([
  ['rows', rows],
  ['rows with weights', { ...rows, weights }],
])(
  'inPieces gives the loss, metrics and gradients of loss for %s, and routes each MoE layer once in order',
  async (_, rows) => {
    setDefaultBackend(referenceBackend())
    const make = () =>
      new DeepSeek({ ...tiny, num_hidden_layers: 3, first_k_dense_replace: 1, num_nextn_predict_layers: 2 })
    const [whole, model] = [make(), make()]
    const expected = whole.loss(rows)
    const routed: number[] = []
    const pieces = model.inPieces(rows)
    const route = routeWithin(model, layer => routed.push(layer))
    const { loss, metrics } = await pieces.forward(together, route)
    expect(routed).toEqual([0, 1, 2, 3])
    expect(pieces.count).toBe(expected.count)
    assertClose('loss', [await loss.item()], [await expected.loss.item()])
    expect(Object.keys(metrics).sort()).toEqual(['balance', 'mtp', 'nll'])
    for (const name of ['balance', 'mtp'])
      assertClose(name, [await metrics[name].item()], [await expected.metrics[name].item()])
    assertClose('nll', [await metrics['nll'].item()], [(await expected.nll.item()) / pieces.count])
    backward(loss)
    backward(expected.loss)
    const own = namedParameters(model)
    for (const [i, { name, parameter }] of namedParameters(whole).entries()) {
      const { grad } = own[i].parameter
      expect([name, grad === null]).toEqual([own[i].name, parameter.grad === null])
      if (grad && parameter.grad)
        assertClose(name, await grad.values(), await parameter.grad.values(), tolerances.gradient)
    }
  },
)
