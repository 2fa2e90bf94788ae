/** @file A layer whose experts lie on several ranks, beside the whole layer. */
import { backward, type Module, Parameter, scope, setDefaultBackend, trainable } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { beforeEach, describe, expect, test } from 'vitest'
import { local } from '../communicator/local.ts'
import { PiecewisePass } from './piecewise-pass.ts'
import { routeOverRanks } from './route-over-ranks.ts'
import { config, experts, newLayer, numbers, seedOf, shardOf, split, tokensOf } from './test-layer.ts'

beforeEach(() => setDefaultBackend(referenceBackend()))

/** The whole layer on one rank's tokens. */
function whole(rank: number, bias?: readonly number[]) {
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

/** Experts of one group get everything; those of the first get nothing. */
const oneSided = [-9, -9, 0, 0, 9, 9, 0, 0]

describe('experts on several ranks', () => {
  test.each([
    [1, undefined],
    [2, undefined],
    [4, undefined],
    [8, undefined],
    [2, oneSided],
    [4, oneSided],
  ] as const)('%i ranks, bias %j: outputs and gradients of the whole layer', async (size, bias) => {
    const all = Array.from({ length: size }, (_, r) => whole(r, bias))
    const found = await local(size, ranks => split(ranks, newLayer(bias)))
    const own = experts / size
    for (const [r, { out, dx, router, shared, routed }] of found.entries()) {
      // Tokens are f32 on their way.
      expect(out).toEqual(near(all[r].out))
      expect(dx).toEqual(near(all[r].dx))
      expect(router).toEqual(all[r].router.map(near))
      expect(shared).toEqual(all[r].shared.map(near))
      // An expert's gradient is that of the tokens of all ranks; no expert that none has chosen has one.
      for (const [k, gradient] of routed.entries()) {
        const total = all.map(w => w.routed[k]).reduce((a, b) => a.map((x, i) => x + b[i]))
        const wanted = total.slice((r * total.length) / size, ((r + 1) * total.length) / size)
        if (gradient === null) expect(wanted.every(x => x === 0)).toBe(true)
        else expect(gradient).toEqual(near(wanted))
      }
    }
    if (bias !== undefined && size === 4) expect(found[0].routed).toEqual([null, null, null])
    // With a rank for each group, a token travels to no more ranks than it may choose groups.
    const { num_experts_per_tok: topK, topk_group } = config
    if (size === config.n_group)
      for (const { chosen } of found)
        for (let t = 0; t < chosen.length; t += topK) {
          const homes = new Set(chosen.slice(t, t + topK).map(e => Math.floor(e / own)))
          expect(homes.size).toBeLessThanOrEqual(topk_group as number)
        }
  })

  test('no tensor is leaked', async () => {
    const layer = newLayer()
    await local(1, async ranks => {
      const shard = shardOf(layer, ranks)
      const before = layer.gate.weight.backend.stats().handles
      await split(ranks, layer, shard)
      expect(layer.gate.weight.backend.stats().handles).toBe(before)
    })
  })

  test('a number of ranks that does not divide the experts is an error', async () => {
    const pass = new PiecewisePass()
    const x = pass.input(tokensOf(0))
    const tokens = { x, weights: x, indices: x }
    const route = local(3, ranks => routeOverRanks(pass, ranks, newLayer().experts, tokens, experts))
    await expect(route).rejects.toThrow(/8 experts cannot be divided among 3 ranks/)
  })
})
