import {
  backward,
  checkpoint,
  gradients,
  type Parameter,
  Random,
  randn,
  setDefaultBackend,
  type Tensor,
  tensor,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { CapacityMoE, type CapacityMoEConfig, withinCapacity } from './index.ts'

setDefaultBackend(referenceBackend())

const config: CapacityMoEConfig = {
  hidden_size: 4,
  moe_intermediate_size: 6,
  n_routed_experts: 3,
  router: 'gshard',
  capacity_factor: 1,
}
const make = (changes: Partial<CapacityMoEConfig>) =>
  new CapacityMoE({ ...config, ...changes }, { random: new Random(3), std: 1 })

describe('capacity', () => {
  const keptChoices = async (indices: number[][], capacity: number, mask?: number[]) => {
    const ids = tensor(Int32Array.from(indices.flat()), [indices.length, indices[0].length])
    return Array.from(
      await withinCapacity(
        ids,
        3,
        capacity,
        mask && tensor(mask, mask.length > indices.length ? ids.shape : undefined),
      ).values(),
    )
  }
  test('earlier tokens go first', async () => {
    expect(await keptChoices([[0], [0], [1], [0], [1]], 2)).toEqual([1, 1, 1, 0, 1])
  })
  test('first choices go before second ones', async () => {
    // Expert 1 is the first choice of tokens 1 and 2, and the second choice of token 0, which has the lowest priority.
    expect(
      await keptChoices(
        [
          [0, 1],
          [1, 0],
          [1, 2],
        ],
        2,
      ),
    ).toEqual([1, 0, 1, 1, 1, 1])
  })
  test('a masked choice takes no capacity', async () => {
    const indices = [
      [0, 1],
      [0, 1],
      [2, 1],
    ]
    expect(await keptChoices(indices, 1, [1, 0, 1, 1, 1, 1])).toEqual([1, 0, 0, 1, 1, 0])
  })
  test('padding takes no capacity', async () => {
    expect(await keptChoices([[0], [0], [0], [0]], 2, [0, 1, 0, 1])).toEqual([0, 1, 0, 1])
  })
})

for (const router of ['switch', 'gshard'] as const) {
  const topK = router === 'gshard' ? 2 : 1

  test(`${router}: output and auxiliary loss are those of the published formulas, and evaluation drops nothing`, async () => {
    const layer = make({ router })
    const x = randn([2, 5, 4], new Random(8))
    let loss: Tensor | null = null
    const out = await layer
      .forward(x, {
        onBalanceLoss: l => {
          loss = l
        },
      })
      .values()
    expect(layer.load).toBeNull()
    const exp = x.reshape([10, 4]).matmul(layer.weight.detach(), { transposeB: true }).exp()
    const p = Array.from(await exp.div(exp.sum(1, true)).values())
    const rows = Array.from({ length: 10 }, (_, t) => p.slice(3 * t, 3 * t + 3))
    const best = rows.map(row => [0, 1, 2].sort((a, b) => row[b] - row[a]).slice(0, topK))
    // E sum_i f_i P_i over first choices.
    const expected = [0, 1, 2].reduce((sum, i) => {
      const f = best.filter(([first]) => first === i).length / 10
      return sum + 3 * f * (rows.reduce((s, row) => s + row[i], 0) / 10)
    }, 0)
    expect(await (loss as unknown as Tensor).detach().item()).toBeCloseTo(expected, 5)
    // The output of every expert for every token, combined by the gates.
    const byExpert = await Promise.all(
      [0, 1, 2].map(async e => {
        const offsets = tensor(Int32Array.from([0, 1, 2, 3], i => (i > e ? 10 : 0)))
        return layer.experts.forward(x.reshape([10, 4]), offsets).values()
      }),
    )
    const expectedOut = rows.flatMap((row, t) => {
      const total = router === 'gshard' ? best[t].reduce((sum, e) => sum + row[e], 0) : 1
      return [0, 1, 2, 3].map(d => best[t].reduce((sum, e) => sum + (row[e] / total) * byExpert[e][4 * t + d], 0))
    })
    assertClose('output', out, expectedOut, tolerances.sum)
  })

  test(`${router}: training drops and counts choices beyond the capacity, which give no gradient to the expert`, async () => {
    // All tokens are equal and choose the same experts. Each expert has a capacity of a third of the 6 * K choices.
    const layer = make({ router, second_expert: 'always' })
    const x = tensor(
      Float32Array.from({ length: 24 }, (_, i) => [0.5, -1, 0.25, 1][i % 4]),
      [1, 6, 4],
    )
    const whole = await layer.forward(x).values()
    const out = await layer.forward(x, { training: true }).values()
    const room = (6 * topK) / 3
    assertClose('kept tokens', out.subarray(0, 4 * room), whole.subarray(0, 4 * room), tolerances.exact)
    expect(Array.from(out.subarray(4 * room))).toEqual(new Array(24 - 4 * room).fill(0))
    const load = Array.from(await (layer.load as Tensor).values()).sort((a, b) => b - a)
    expect(load).toEqual(router === 'gshard' ? [6, 6, 0] : [6, 0, 0])
    expect(Array.from(await (layer.kept as Tensor).values())).toEqual([room * topK])
    layer.reset()
    expect([layer.load, layer.kept]).toEqual([null, null])

    const lastOnly = layer.forward(x, { training: true }).narrow(1, 5, 6)
    const [gradient] = gradients(lastOnly.sum(), [layer.experts.down_proj])
    expect((await (gradient as Tensor).abs().sum().item()) === 0).toBe(true)
  })
}

describe("GShard's random second experts", () => {
  const [tokens, hidden] = [400, 4]
  const x = randn([2, tokens / 2, hidden], new Random(12))
  // Enough capacity for everything, so that only the random draw removes second experts.
  const withCapacity = () => make({ capacity_factor: 3 })

  test("are used with probability min(1, 2 g), drawn from the layer's stream", async () => {
    const layer = withCapacity()
    const { seed, stream, position } = layer.random
    const drawn = new Random(seed, stream, position).uniform(tokens)
    const exp = x.reshape([tokens, hidden]).matmul(layer.weight.detach(), { transposeB: true }).exp()
    const { values } = exp.div(exp.sum(1, true)).topk(2)
    const p = await values.values()
    const second = Array.from({ length: tokens }, (_, t) => p[2 * t + 1] / (p[2 * t] + p[2 * t + 1]))
    const used = second.map((g, t) => drawn[t] < 2 * g)
    const whole = await layer.forward(x).values()
    const out = await layer.forward(x, { training: true }).values()
    const count = used.filter(Boolean).length
    expect(Array.from(await (layer.kept as Tensor).values())).toEqual([tokens + count])
    for (let t = 0; t < tokens; t++) {
      const row = (values: ArrayLike<number>) => Array.from({ length: hidden }, (_, d) => values[hidden * t + d])
      if (used[t]) expect(row(out)).toEqual(row(whole))
      else expect(row(out)).not.toEqual(row(whole))
    }
    // The variance of a sum of independent draws: 400 times q (1 - q).
    const q = second.map(g => Math.min(1, 2 * g))
    const mean = q.reduce((sum, x) => sum + x)
    const deviation = Math.sqrt(q.reduce((sum, x) => sum + x * (1 - x), 0))
    expect(deviation).toBeGreaterThan(3)
    expect(Math.abs(count - mean)).toBeLessThan(4 * deviation)
  })

  test('are the same for the same seed and in a recomputed pass, and differ between passes', async () => {
    const run = (layer: CapacityMoE) => layer.forward(x, { training: true })
    const [a, b] = [withCapacity(), withCapacity()]
    const first = await run(a).values()
    expect(await run(b).values()).toEqual(first)
    expect(await run(a).values()).not.toEqual(first)
    const position = a.random.position
    const c = withCapacity()
    run(c)
    backward(run(b).sum())
    backward(checkpoint(h => c.forward(h, { training: true }), x).sum())
    const of = async ({ grad }: Parameter) => (grad as Tensor).values()
    assertClose('gate', await of(c.weight), await of(b.weight), tolerances.sum)
    assertClose('experts', await of(c.experts.down_proj), await of(b.experts.down_proj), tolerances.sum)
    expect(c.random.position).toBe(position)
  })
})

test('invalid sizes are rejected', () => {
  expect(() => make({ n_routed_experts: 1 })).toThrow(/n_routed_experts = 1 is less than the 2 that gshard needs/)
  expect(() => make({ capacity_factor: 0 })).toThrow(/capacity_factor = 0/)
  expect(() => make({ n_routed_experts: 2.5, moe_intermediate_size: 0 })).toThrow(
    /intermediate_size = 0.*experts = 2.5/,
  )
  expect(() => make({ router: 'hash' as 'switch' })).toThrow(/router = "hash" is not one of switch, gshard/)
  expect(() => make({ second_expert: 'never' as 'always' })).toThrow(
    /second_expert = "never" is not one of random, always/,
  )
})

test.each(['switch', 'gshard'] as const)(
  '%s: an input without tokens gives an empty output and a loss of 0',
  async router => {
    const losses: Tensor[] = []
    const out = make({ router }).forward(zeros([1, 0, config.hidden_size]), {
      training: true,
      onBalanceLoss: x => losses.push(x),
    })
    expect(out.shape).toEqual([1, 0, config.hidden_size])
    expect(await losses[0].item()).toBe(0)
  },
)
