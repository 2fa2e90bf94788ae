import {
  defaultBackend,
  gradients,
  Random,
  randn,
  scope,
  setDefaultBackend,
  type Tensor,
  tensor,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import {
  auxFree,
  type Balancer,
  combineBalancers,
  communication,
  communicationBalanceLoss,
  deviceBalanceLoss,
  deviceLevel,
  expertBalanceLoss,
  expertLevel,
  MoELayer,
  noBalance,
  type RouterConfig,
  sequenceBalanceLoss,
  sequenceWise,
} from './index.ts'

setDefaultBackend(referenceBackend())

const [sequences, time, experts, topK, devices, limit] = [2, 5, 8, 3, 4, 2]

/** The formulas of the V2 report (eq. 23-31) as loops, for the affinities and choices of one sequence. */
function expectedLosses(scores: number[][], chosen: number[][]) {
  const tokens = scores.length
  const f = Array.from({ length: experts }, (_, i) => {
    const count = chosen.filter(ids => ids.includes(i)).length
    return (experts / (topK * tokens)) * count
  })
  const p = f.map((_, i) => scores.reduce((sum, row) => sum + row[i], 0) / tokens)
  const size = experts / devices
  const sumOfDevice = (values: number[], d: number) => values.slice(d * size, (d + 1) * size).reduce((a, b) => a + b, 0)
  const ids = Array.from({ length: devices }, (_, d) => d)
  const sent = ids.map(d => chosen.filter(row => row.some(i => Math.floor(i / size) === d)).length)
  return {
    expert: f.reduce((sum, x, i) => sum + x * p[i], 0),
    device: ids.reduce((sum, d) => sum + (sumOfDevice(f, d) / size) * sumOfDevice(p, d), 0),
    communication: ids.reduce((sum, d) => sum + (devices / (limit * tokens)) * sent[d] * sumOfDevice(p, d), 0),
  }
}

const random = new Random(11)
const logits = randn([sequences * time, experts], random)
const rows = (values: ArrayLike<number>, width: number) =>
  Array.from({ length: values.length / width }, (_, row) => Array.from(values).slice(row * width, (row + 1) * width))

/** Tracked affinities, and the top K of each token. */
function pass() {
  const leaf = logits.mul(1)
  leaf.tracked = true
  const exp = leaf.exp()
  const scores = exp.div(exp.sum(1, true))
  return { scores, indices: scores.detach().topk(topK).indices, sequences }
}

const losses = {
  expert: expertBalanceLoss,
  device: (p: ReturnType<typeof pass>) => deviceBalanceLoss(p, devices),
  communication: (p: ReturnType<typeof pass>) => communicationBalanceLoss(p, devices, limit),
}

describe('losses of V2', () => {
  for (const name of ['expert', 'device', 'communication'] as const) {
    test(`${name}: the value is that of the formula, averaged over sequences, without padding`, async () => {
      const routing = pass()
      const scores = rows(await routing.scores.values(), experts)
      const chosen = rows(await routing.indices.values(), topK)
      const part = (from: number, to: number) => expectedLosses(scores.slice(from, to), chosen.slice(from, to))[name]
      const loss = losses[name](routing)
      expect(await loss.detach().item()).toBeCloseTo((part(0, time) + part(time, 2 * time)) / 2, 5)
      // The last two tokens of the second sequence are padding.
      const mask = tensor([1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
      const masked = losses[name]({ ...routing, mask } as never)
      expect(await masked.detach().item()).toBeCloseTo((part(0, time) + part(time, 2 * time - 2)) / 2, 5)
    })

    test(`${name}: the gradient is that of the affinities with constant frequencies`, async () => {
      const routing = pass()
      const at = Array.from(await routing.scores.values())
      const chosen = rows(await routing.indices.values(), topK)
      const [found] = gradients(losses[name](routing), [routing.scores])
      const value = (scores: number[]) => {
        const all = rows(scores, experts)
        const [a, b] = [0, time].map(
          from => expectedLosses(all.slice(from, from + time), chosen.slice(from, from + time))[name],
        )
        return (a + b) / 2
      }
      const expected = at.map((_, i) => {
        const moved = (by: number) => value(at.map((x, j) => (j === i ? x + by : x)))
        return (moved(1e-4) - moved(-1e-4)) / 2e-4
      })
      assertClose('gradient', await (found as Tensor).values(), expected, tolerances.gradient)
    })
  }

  test('balanced routing has a loss of 1', async () => {
    const scores = tensor(new Float32Array(64).fill(1 / 8), [8, 8])
    const indices = tensor(
      Int32Array.from({ length: 16 }, (_, i) => (i % 2 === 0 ? i / 2 : (Math.floor(i / 2) + 4) % 8)),
      [8, 2],
    )
    const balanced = { scores, indices, sequences: 1 }
    expect(await expertBalanceLoss(balanced).item()).toBeCloseTo(1, 6)
    expect(await deviceBalanceLoss(balanced, 4).item()).toBeCloseTo(1, 6)
    expect(await communicationBalanceLoss(balanced, 4, 2).item()).toBeCloseTo(1, 6)
  })

  test('the sequence-wise loss excludes padding', async () => {
    const { scores } = pass()
    const mask = tensor([1, 1, 1, 0, 0, 1, 1, 1, 0, 0])
    const short = scores.reshape([2, 5, 8]).narrow(1, 0, 3).reshape([6, 8])
    const expected = await sequenceBalanceLoss(short.detach(), 2, topK).item()
    expect(await sequenceBalanceLoss(scores.detach(), 2, topK, mask).item()).toBeCloseTo(expected, 6)
  })
})

const config: RouterConfig = {
  hidden_size: 8,
  moe_intermediate_size: 4,
  n_routed_experts: 8,
  num_experts_per_tok: 2,
  n_group: 4,
  topk_group: 2,
}

describe('balancers', () => {
  test('updates of a custom balancer are not recorded, and leave nothing behind', () => {
    const custom: Balancer = { update: (bias, load) => bias.assign(bias.add(load.cast('f32').mul(-0.01))) }
    const layer = new MoELayer(config, { random: new Random(4), std: 0.5, balancer: custom })
    layer.gate.e_score_correction_bias!.trainable = true // would record the update
    const x = randn([2, 6, 8], new Random(5))
    const handles = () => defaultBackend().stats().handles
    scope(() => layer.forward(x, { training: true }))
    const counted = handles()
    layer.rebalance()
    expect(handles()).toBeLessThan(counted) // the counts are freed, and nothing is added
  })

  /** Runs one training pass and returns the balancer's loss, or null. */
  async function lossOf(balancer: Balancer): Promise<number | null> {
    const layer = new MoELayer(config, { random: new Random(4), std: 0.5, balancer })
    let found: Tensor | null = null
    const x = randn([2, 6, 8], new Random(5))
    layer.forward(x, {
      training: true,
      onBalancerLoss: loss => {
        found = loss
      },
    })
    layer.rebalance()
    // Evaluation computes no loss.
    layer.forward(x, {
      onBalancerLoss: () => {
        throw new Error('a loss in evaluation')
      },
    })
    return found === null ? null : (found as Tensor).detach().item()
  }

  test('are interchangeable, and can be combined', async () => {
    expect(await lossOf(noBalance())).toBeNull()
    expect(await lossOf(auxFree())).toBeNull()
    expect(await lossOf(sequenceWise({ alpha: 0 }))).toBeNull()
    const parts = [
      sequenceWise({ alpha: 2 }),
      expertLevel(),
      deviceLevel({ devices: 4 }),
      communication({ devices: 4, limit: 2 }),
    ]
    const each = await Promise.all(parts.map(lossOf))
    for (const loss of each) expect(loss).toBeGreaterThan(0)
    const sum = each.reduce<number>((a, b) => a + (b as number), 0)
    expect(await lossOf(combineBalancers(noBalance(), auxFree(), ...parts))).toBeCloseTo(sum, 5)
    expect(await lossOf(expertLevel({ alpha: 0.006 }))).toBeCloseTo(2 * (each[1] as number), 6)
    await expect(lossOf(deviceLevel({ devices: 3 }))).rejects.toThrow(/8 experts are not divisible by 3 devices/)
  })

  test('rejects what is not a balancer, or would update a bias that does not exist', () => {
    const config = { hidden_size: 4, moe_intermediate_size: 4, n_routed_experts: 4, num_experts_per_tok: 2 }
    const factory = auxFree as unknown as Balancer
    const configError = (message: RegExp) =>
      expect.objectContaining({ code: 'E_CONFIG', message: expect.stringMatching(message) })
    const isFunction = /the balancer is the function auxFree; pass the result of a function such as auxFree\(\)/
    expect(() => new MoELayer(config, { balancer: factory })).toThrow(configError(isFunction))
    expect(() => combineBalancers(sequenceWise(), factory)).toThrow(configError(isFunction))
    const greedy = { ...config, topk_method: 'greedy' } as const
    for (const balancer of [auxFree(), combineBalancers(auxFree(), sequenceWise())])
      expect(() => new MoELayer(greedy, { balancer })).toThrow(configError(/but topk_method "greedy" has none/))
    for (const balancer of [expertLevel(), combineBalancers(expertLevel(), sequenceWise()), noBalance()])
      expect(new MoELayer(greedy, { balancer }).balancer).toBe(balancer)
  })

  test('factors that are not finite numbers are rejected before they change a loss or a bias', async () => {
    for (const wrong of [Number.NaN, Number.POSITIVE_INFINITY, '1e-4', () => Number.NaN, () => undefined] as number[]) {
      await expect(lossOf(sequenceWise({ alpha: wrong }))).rejects.toThrow(/the factor at step \d+ is /)
      const layer = new MoELayer(config, { balancer: auxFree({ speed: wrong }) })
      layer.forward(zeros([1, 2, config.hidden_size]), { training: true })
      expect(() => layer.rebalance({ step: 0 })).toThrow(/the factor at step 0 is /)
    }
    const layer = new MoELayer(config)
    layer.forward(zeros([1, 2, config.hidden_size]), { training: true })
    expect(() => layer.updateBias({ speed: Number.NaN })).toThrow(/speed = NaN/)
    expect(Array.from(await layer.gate.e_score_correction_bias!.values()).every(Number.isFinite)).toBe(true)
    for (const limit of [undefined, 0, 1.5, 5] as number[])
      expect(() => communication({ devices: 4, limit })).toThrow(/limit = .* is not in 1..devices = 4/)
  })

  test('a balancer that is a class instance keeps its fields, alone and combined', async () => {
    class Constant implements Balancer {
      readonly value = tensor([3], [])
      readonly updates: number[] = []
      loss(): Tensor {
        return this.value
      }
      update(_bias: unknown, _load: unknown, step: number): void {
        this.updates.push(step)
      }
    }
    const own = new Constant()
    const layer = new MoELayer(config, {
      random: new Random(4),
      balancer: combineBalancers(own, sequenceWise({ alpha: 0 })),
    })
    const seen: Tensor[] = []
    layer.forward(randn([1, 6, 8], new Random(5)), { training: true, onBalancerLoss: loss => seen.push(loss) })
    layer.rebalance()
    expect(await seen[0].item()).toBe(3)
    expect(own.updates).toEqual([0])
  })

  test('without tokens the losses are 0, not NaN', async () => {
    const layer = new MoELayer(config, {
      balancer: combineBalancers(sequenceWise(), expertLevel(), deviceLevel({ devices: 2 })),
    })
    const seen: Tensor[] = []
    const see = (loss: Tensor) => seen.push(loss)
    layer.forward(zeros([1, 0, 8]), { training: true, onBalanceLoss: see, onBalancerLoss: see })
    expect(await Promise.all(seen.map(loss => loss.item()))).toEqual([0, 0])
  })

  test('the speed of the bias follows its schedule, also with centered biases', async () => {
    const layer = new MoELayer(config, {
      random: new Random(4),
      std: 0.5,
      balancer: auxFree({ speed: step => (step < 2 ? 0.5 : 0) }),
    })
    const biases = async () => Array.from(await (layer.gate.e_score_correction_bias as Tensor).values())
    const x = randn([1, 16, 8], new Random(5))
    const step = async () => {
      layer.forward(x, { training: true })
      layer.rebalance()
      return biases()
    }
    const first = await step()
    expect(first.some(b => Math.abs(b) === 0.5)).toBe(true)
    const second = await step()
    expect(second).not.toEqual(first)
    expect(await step()).toEqual(second)
    // After resuming, the caller sets the step.
    layer.forward(x, { training: true })
    layer.rebalance({ step: 0 })
    expect(await biases()).not.toEqual(second)

    const centered = new MoELayer(config, {
      random: new Random(4),
      std: 0.5,
      balancer: auxFree({ center: true, speed: 1 }),
    })
    centered.forward(x, { training: true })
    centered.rebalance()
    const values = Array.from(await (centered.gate.e_score_correction_bias as Tensor).values())
    expect(values.reduce((a, b) => a + b, 0)).toBeCloseTo(0, 5)
    expect(Math.max(...values)).toBeGreaterThan(0)
  })

  test('padding is computed but not counted', async () => {
    const layer = new MoELayer(config, { random: new Random(4), std: 0.5 })
    const x = randn([2, 6, 8], new Random(5))
    const mask = tensor([1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0], [2, 6])
    const plain = layer.forward(x, { training: true, mask })
    const load = Array.from(await (layer.load as Tensor).values())
    expect(load.reduce((a, b) => a + b, 0)).toBe(7 * 2)
    layer.updateBias({ speed: 0 })
    expect(layer.load).toBeNull()
    // A pass over the counted tokens only has the same loads.
    layer.forward(
      x
        .reshape([12, 8])
        .takeRows(tensor(Int32Array.of(0, 1, 2, 3, 6, 7, 8)))
        .reshape([1, 7, 8]),
      { training: true },
    )
    expect(Array.from(await (layer.load as Tensor).values())).toEqual(load)
    assertClose('output', await plain.values(), await layer.forward(x).values(), tolerances.exact)
  })

  test('onLoad reports loads in evaluation without counting them', async () => {
    const layer = new MoELayer(config, { random: new Random(4), std: 0.5 })
    const seen: Tensor[] = []
    layer.forward(randn([1, 6, 8], new Random(5)), { onLoad: load => seen.push(load) })
    expect(seen).toHaveLength(1)
    expect(Array.from(await seen[0].values()).reduce((a, b) => a + b, 0)).toBe(12)
    expect(layer.load).toBeNull()
  })
})
