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
import { MoELayer, type RouterConfig, type TokenDropping, withinDeviceBudget } from './index.ts'

setDefaultBackend(referenceBackend())

/**
 * The rule as loops: devices keep their best choices up to the budget, and always those of undropped sequences, which
 * count first.
 */
function expectedKept(
  scores: ArrayLike<number>,
  indices: ArrayLike<number>,
  sizes: { tokens: number; experts: number; topK: number; devices: number; factor: number },
  real: (token: number) => boolean,
  undropped: (token: number) => boolean,
): number[] {
  const { tokens, experts, topK, devices, factor } = sizes
  const kept = new Array<number>(tokens * topK).fill(0)
  const slots = kept.map((_, s) => s).filter(s => real(Math.floor(s / topK)))
  const budget = Math.ceil((factor * slots.length) / devices)
  for (let d = 0; d < devices; d++) {
    const affinity = (s: number) => scores[Math.floor(s / topK) * experts + indices[s]]
    const always = (s: number) => undropped(Math.floor(s / topK))
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
  // Offsets that give some devices far more choices than others.
  const logits = randn([24, 8], random).add(tensor([3, 2, 0, 0, -1, 1, 0, -2]))
  const scores = softmax(logits)
  const { indices } = scores.topk(3)
  const cases = [
    { name: 'drops from all sequences', factor: 1, padding: [] as number[], undroppedRows: [] as number[] },
    { name: 'has half the size with half the capacity factor', factor: 0.5, padding: [], undroppedRows: [] },
    { name: 'does not count padding', factor: 1, padding: [4, 5, 11, 23], undroppedRows: [] },
    { name: 'keeps all choices of an undropped sequence', factor: 1, padding: [], undroppedRows: [1] },
    { name: 'may be exceeded by undropped sequences', factor: 0.5, padding: [0, 5, 13], undroppedRows: [0, 2, 3] },
  ]
  test.each(cases)('$name', async ({ factor, padding, undroppedRows }) => {
    const mask = tensor(Float32Array.from({ length: 24 }, (_, t) => (padding.includes(t) ? 0 : 1)))
    const undropped = tensor(Float32Array.from({ length: 4 }, (_, b) => (undroppedRows.includes(b) ? 1 : 0)))
    const pass = {
      scores,
      indices,
      sequences: 4,
      mask: padding.length ? mask : undefined,
      undropped: undroppedRows.length ? undropped : undefined,
    }
    const kept = Array.from(await withinDeviceBudget(pass, { devices: 4, capacity_factor: factor }).values())
    const [s, i] = [await scores.values(), await indices.values()]
    const real = (t: number) => !padding.includes(t)
    const expected = expectedKept(s, i, { ...sizes, factor }, real, t => undroppedRows.includes(Math.floor(t / 6)))
    expect(kept).toEqual(expected)
    expect(kept).toContain(0)
  })

  test('drops nothing if the load is balanced', async () => {
    const balanced = tensor(
      Int32Array.from({ length: 48 }, (_, s) => s % 8),
      [24, 2],
    )
    const kept = withinDeviceBudget({ scores, indices: balanced, sequences: 4 }, { devices: 4 })
    expect(await kept.sum().item()).toBe(48)
  })
})

describe('a layer with token dropping', () => {
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

  test('has no gradient from dropped choices, and recomputation counts them once', async () => {
    const [plain, recomputed] = [make(0.4), make(0.4)]
    backward(plain.forward(x, { training: true }).sum())
    backward(checkpoint(h => recomputed.forward(h, { training: true }), x).sum())
    const of = async ({ grad }: Parameter) => (grad as Tensor).values()
    assertClose('experts', await of(recomputed.experts.down_proj), await of(plain.experts.down_proj), tolerances.sum)
    assertClose('gate', await of(recomputed.gate.weight), await of(plain.gate.weight), tolerances.sum)
    expect(await (recomputed.kept as Tensor).values()).toEqual(await (plain.kept as Tensor).values())
    const minimal = make(1e-9)
    // With a budget of one choice per device, all tokens but four get only the shared expert.
    backward(minimal.forward(x, { training: true }).sum())
    expect(Array.from(await (minimal.kept as Tensor).values())).toEqual([4])
  })

  test('the number of devices must divide the number of experts, and the capacity factor be positive', () => {
    const layer = (dropping: TokenDropping) => () => new MoELayer(config, { dropping })
    expect(layer({ devices: 3 })).toThrow(/8 experts are not divisible by 3 devices/)
    for (const capacity_factor of [0, -1, Number.NaN, '1' as unknown as number])
      expect(layer({ devices: 4, capacity_factor })).toThrow(/capacity_factor = .* is not a positive number/)
  })
})
