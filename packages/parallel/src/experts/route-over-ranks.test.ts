/** @file A layer with experts sharded over ranks, compared with the same layer on one rank. */
import { backward, type Module, Parameter, scope, setDefaultBackend, trainable } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { beforeEach, describe, expect, test } from 'vitest'
import { local } from '../communicator/local.ts'
import { PiecewisePass } from './piecewise-pass.ts'
import { routeOverRanks } from './route-over-ranks.ts'
import { config, experts, newLayer, numbers, seedOf, shardedPass, shardOf, tokensOf } from './test-layer.ts'

beforeEach(() => setDefaultBackend(referenceBackend()))

/** Forward and backward pass of the layer with all experts, on the tokens of one rank. */
function unsharded(rank: number, bias?: readonly number[]) {
  const layer = newLayer(bias)
  const x = new Parameter(tokensOf(rank))
  return scope(() => {
    const y = layer.forward(x.reshape([1, ...x.shape])).reshape(x.shape)
    const out = numbers(y)
    backward(y, { gradient: seedOf(rank) })
    const { gate, shared_experts, experts: all } = layer
    const [router, shared, routed] = [gate, shared_experts as Module, all].map(module =>
      trainable(module).map(({ grad }) => numbers(grad) as number[]),
    )
    return { out, dx: numbers(x.grad), router, shared, routed }
  })
}

const near = (values: readonly number[] | null) => values?.map(x => expect.closeTo(x, 5)) ?? null

/** A selection bias that sends every token to both experts of the third group, and none to those of the first. */
const imbalanced = [-9, -9, 0, 0, 9, 9, 0, 0]

describe('a layer with sharded experts', () => {
  test.each([
    [1, undefined],
    [2, undefined],
    [4, undefined],
    [8, undefined],
    [2, imbalanced],
    [4, imbalanced],
  ] as const)(
    'gives the outputs and gradients of the unsharded layer: %i ranks, selection bias %j',
    async (size, bias) => {
      const all = Array.from({ length: size }, (_, r) => unsharded(r, bias))
      const found = await local(size, ranks => shardedPass(ranks, newLayer(bias)))
      const own = experts / size
      for (const [r, { out, dx, router, shared, routed }] of found.entries()) {
        // Tokens are sent as f32.
        expect(out).toEqual(near(all[r].out))
        expect(dx).toEqual(near(all[r].dx))
        expect(router).toEqual(all[r].router.map(near))
        expect(shared).toEqual(all[r].shared.map(near))
        // The gradient of an expert is summed over the tokens of all ranks. An expert that no token chooses has none.
        for (const [k, gradient] of routed.entries()) {
          const total = all.map(w => w.routed[k]).reduce((a, b) => a.map((x, i) => x + b[i]))
          const expectedShard = total.slice((r * total.length) / size, ((r + 1) * total.length) / size)
          if (gradient === null) expect(expectedShard.every(x => x === 0)).toBe(true)
          else expect(gradient).toEqual(near(expectedShard))
        }
      }
      if (bias !== undefined && size === 4) expect(found[0].routed).toEqual([null, null, null])
      // With one rank per group, a token is sent to at most topk_group ranks.
      const { num_experts_per_tok: topK, topk_group } = config
      if (size === config.n_group)
        for (const { chosen } of found)
          for (let t = 0; t < chosen.length; t += topK) {
            const destinations = new Set(chosen.slice(t, t + topK).map(e => Math.floor(e / own)))
            expect(destinations.size).toBeLessThanOrEqual(topk_group as number)
          }
    },
  )

  test('leaks no tensor', async () => {
    const layer = newLayer()
    await local(1, async ranks => {
      const shard = shardOf(layer, ranks)
      const before = layer.gate.weight.backend.stats().handles
      await shardedPass(ranks, layer, shard)
      expect(layer.gate.weight.backend.stats().handles).toBe(before)
    })
  })

  test('rejects a number of ranks that does not divide the number of experts', async () => {
    const pass = new PiecewisePass()
    const x = pass.input(tokensOf(0))
    const tokens = { x, weights: x, indices: x }
    const route = local(3, ranks => routeOverRanks(pass, ranks, newLayer().experts, tokens, experts))
    await expect(route).rejects.toThrow(/8 experts cannot be divided among 3 ranks/)
  })
})
