import {
  backward,
  checkpoint,
  type Parameter,
  Random,
  randn,
  setDefaultBackend,
  softmax,
  type Tensor,
  tensor,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { MoELayer, type RouterConfig, withinDeviceBudget } from './index.ts'

setDefaultBackend(referenceBackend())

/**
 * The rule in loops: devices keep their best choices up to the budget, and always those of undropped sequences, which
 * count first.
 */
function plainly(
  scores: ArrayLike<number>,
  indices: ArrayLike<number>,
  sizes: { tokens: number; experts: number; topK: number; devices: number; factor: number },
  real: (token: number) => boolean,
  spared: (token: number) => boolean,
): number[] {
  const { tokens, experts, topK, devices, factor } = sizes
  const kept = new Array<number>(tokens * topK).fill(0)
  const slots = kept.map((_, s) => s).filter(s => real(Math.floor(s / topK)))
  const budget = Math.ceil((factor * slots.length) / devices)
  for (let d = 0; d < devices; d++) {
    const affinity = (s: number) => scores[Math.floor(s / topK) * experts + indices[s]]
    const always = (s: number) => spared(Math.floor(s / topK))
    const queue = slots
      .filter(s => Math.floor(indices[s] / (experts / devices)) === d)
      .sort((a, b) => Number(always(b)) - Number(always(a)) || affinity(b) - affinity(a) || a - b)
    queue.forEach((s, rank) => {
      if (rank < budget || always(s)) kept[s] = 1
    })
  }
  return kept
}

describe('the budget of a device', () => {
  const sizes = { tokens: 24, experts: 8, topK: 3, devices: 4, factor: 1 }
  const random = new Random(21)
  // A common offset, so that some devices get far more choices than others.
  const logits = randn([24, 8], random).add(tensor([3, 2, 0, 0, -1, 1, 0, -2]))
  const scores = softmax(logits)
  const { indices } = scores.topk(3)
  const cases = [
    { name: 'no padding, none spared', factor: 1, padding: [] as number[], spared: [] as number[] },
    { name: 'a tighter budget', factor: 0.5, padding: [], spared: [] },
    { name: 'padding', factor: 1, padding: [4, 5, 11, 23], spared: [] },
    { name: 'a spared sequence', factor: 1, padding: [], spared: [1] },
    { name: 'spared sequences beyond the budget, padding', factor: 0.5, padding: [0, 5, 13], spared: [0, 2, 3] },
  ]
  test.each(cases)('$name', async ({ factor, padding, spared }) => {
    const mask = tensor(Float32Array.from({ length: 24 }, (_, t) => (padding.includes(t) ? 0 : 1)))
    const undropped = tensor(Float32Array.from({ length: 4 }, (_, b) => (spared.includes(b) ? 1 : 0)))
    const pass = {
      scores,
      indices,
      sequences: 4,
      mask: padding.length ? mask : undefined,
      undropped: spared.length ? undropped : undefined,
    }
    const kept = Array.from(await withinDeviceBudget(pass, { devices: 4, capacity_factor: factor }).values())
    const [s, i] = [await scores.values(), await indices.values()]
    const real = (t: number) => !padding.includes(t)
    const expected = plainly(s, i, { ...sizes, factor }, real, t => spared.includes(Math.floor(t / 6)))
    expect(kept).toEqual(expected)
    expect(kept).toContain(0)
  })

  test('nothing is dropped when the load is even', async () => {
    const even = tensor(
      Int32Array.from({ length: 48 }, (_, s) => s % 8),
      [24, 2],
    )
    const kept = withinDeviceBudget({ scores, indices: even, sequences: 4 }, { devices: 4 })
    expect(await kept.sum().item()).toBe(48)
  })
})

describe('in the layer', () => {
  const config: RouterConfig = {
    hidden_size: 8,
    moe_intermediate_size: 6,
    n_routed_experts: 8,
    num_experts_per_tok: 3,
    n_shared_experts: 1,
    n_group: 4,
    topk_group: 3,
    topk_method: 'group_limited_greedy',
    norm_topk_prob: false,
    routed_scaling_factor: 16,
  }
  const make = (factor?: number) =>
    new MoELayer(config, {
      random: new Random(5),
      std: 0.5,
      dropping: factor === undefined ? undefined : { devices: 4, capacity_factor: factor },
    })
  const x = randn([5, 6, 8], new Random(6))

  test('drops only in training, counts kept choices, and never drops from the given sequences', async () => {
    const [free, layer] = [make(), make(1)]
    const whole = await free.forward(x).values()
    expect(await layer.forward(x).values()).toEqual(whole)
    expect(layer.kept).toBeNull()
    const undropped = tensor(Float32Array.of(0, 0, 1, 0, 0))
    const out = await layer.forward(x, { training: true, undropped }).values()
    const row = (values: Float64Array | ArrayLike<number>, b: number) => Array.from(values).slice(b * 48, (b + 1) * 48)
    expect(row(out, 2)).toEqual(row(whole, 2))
    expect(out).not.toEqual(whole)
    const kept = (await (layer.kept as Tensor).values())[0]
    // A device keeps at most 23 of 90 choices, except for the 18 of the undropped sequence.
    expect(kept).toBeLessThan(90)
    expect(kept).toBeGreaterThanOrEqual(23)
    const load = Array.from(await (layer.load as Tensor).values())
    expect(load.reduce((sum, n) => sum + n)).toBe(90)
    layer.updateBias()
    expect([layer.kept, layer.load]).toEqual([null, null])
  })

  test('a dropped choice gives no gradient to its expert; recomputation counts once', async () => {
    const [plain, again] = [make(0.4), make(0.4)]
    backward(plain.forward(x, { training: true }).sum())
    backward(checkpoint(h => again.forward(h, { training: true }), x).sum())
    const of = async ({ grad }: Parameter) => (grad as Tensor).values()
    assertClose('experts', await of(again.experts.down_proj), await of(plain.experts.down_proj), tolerances.sum)
    assertClose('gate', await of(again.gate.weight), await of(plain.gate.weight), tolerances.sum)
    expect(await (again.kept as Tensor).values()).toEqual(await (plain.kept as Tensor).values())
    const nothing = make(1e-9)
    // With a budget of one choice per device, all tokens but four get only the shared expert.
    backward(nothing.forward(x, { training: true }).sum())
    expect(Array.from(await (nothing.kept as Tensor).values())).toEqual([4])
  })

  test('devices must share the experts evenly', () => {
    const layer = new MoELayer(config, { dropping: { devices: 3 } })
    expect(() => layer.forward(x, { training: true })).toThrow(/8 experts are not divisible by 3 devices/)
  })
})
