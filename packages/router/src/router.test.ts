import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { readSafetensors } from '@moe/checkpoint'
import {
  adamwStep,
  addAdapters,
  backward,
  checkpoint,
  deferWeights,
  disposeModule,
  fromHost,
  full,
  gradients,
  loadStateDict,
  materialize,
  namedParameters,
  Parameter,
  type QuantizedParameter,
  Random,
  randn,
  routerTopk,
  scope,
  setDefaultBackend,
  stateDict,
  type Tensor,
  tensor,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import {
  auxFree,
  CapacityMoE,
  Experts,
  MoELayer,
  noBalance,
  type RouterConfig,
  routerAttrs,
  sequenceBalanceLoss,
  summarizeLoad,
  updateBias,
} from './index.ts'

setDefaultBackend(referenceBackend())

const fixture = (name: string) => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url))
const tolerance = { relative: 1e-4, absolute: 1e-5 }
const gradientTolerance = { relative: 1e-3, absolute: 1e-5 }

for (const name of [
  'v3',
  'v3-one-group',
  'v3-no-norm',
  'v3-negative-bias',
  'v3-large-bias',
  'v2-greedy',
  'v2-group-limited',
]) {
  test(`outputs, loads and gradients equal those of the released MoE block: ${name}`, async () => {
    const { config } = JSON.parse(readFileSync(fixture(`${name}.json`), 'utf8')) as { config: RouterConfig }
    await using file = await readSafetensors(fixture(`${name}.safetensors`))
    const layer = new MoELayer(config)
    const own = new Set(stateDict(layer).map(entry => entry.name))
    await loadStateDict(layer, {
      keys: () => file.keys().filter(key => own.has(key)),
      info: key => file.info(key) as never,
      read: async key => (await file.read(key)).data as Float32Array,
    })
    const get = async (key: string) => {
      const { shape, data } = await file.read(key)
      return fromHost(data as Float32Array, shape, 'f32')
    }
    const x = (await get('hidden_states')).mul(1)
    x.tracked = true
    const out = layer.forward(x, { training: true })
    assertClose('output', await out.values(), (await file.read('output')).data as Float32Array, tolerance)
    assertClose(
      'loads',
      await (layer.load as Tensor).values(),
      (await file.read('counts')).data as Int32Array,
      tolerances.exact,
    )

    const { indices } = layer.gate.forward(x.detach().reshape([-1, config.hidden_size]))
    const chosen = await indices.values()
    const expected = (await file.read('ids')).data as Int32Array
    const k = config.num_experts_per_tok
    const sorted = (ids: ArrayLike<number>) =>
      Array.from({ length: ids.length / k }, (_, row) =>
        Array.from(ids)
          .slice(row * k, (row + 1) * k)
          .sort((a, b) => a - b),
      ).flat()
    expect(sorted(chosen)).toEqual(sorted(expected))

    const named = namedParameters(layer).filter(({ parameter }) => parameter.trainable)
    const found = gradients(out, [x, ...named.map(({ parameter }) => parameter)], {
      gradient: await get('grad_output'),
    })
    assertClose(
      'grad of the input',
      await (found[0] as Tensor).values(),
      (await file.read('grad.hidden_states')).data as Float32Array,
      gradientTolerance,
    )
    for (const [i, { name: key, slices }] of named.entries()) {
      const gradient = await (found[i + 1] as Tensor).values()
      const parts = await Promise.all(
        (slices ?? [key]).map(async slice => (await file.read(`grad.${slice}`)).data as Float32Array),
      )
      assertClose(
        `grad of ${key}`,
        gradient,
        parts.flatMap(part => Array.from(part)),
        gradientTolerance,
      )
    }
    layer.updateBias({ speed: 0 })
  })
}

test('the sequence-wise balance loss and its gradient equal those of the reference', async () => {
  const { config, sequenceBalanceLoss: expected } = JSON.parse(readFileSync(fixture('v3.json'), 'utf8'))
  await using file = await readSafetensors(fixture('v3.safetensors'))
  const { shape, data } = await file.read('router_logits')
  const logits = fromHost(data as Float32Array, shape, 'f32').mul(1)
  logits.tracked = true
  const loss = sequenceBalanceLoss(logits.sigmoid(), 2, config.num_experts_per_tok)
  expect(await loss.detach().item()).toBeCloseTo(expected, 5)
  const [gradient] = gradients(loss, [logits])
  assertClose(
    'gradient',
    await (gradient as Tensor).values(),
    (await file.read('seq_loss.grad_logits')).data as Float32Array,
    gradientTolerance,
  )
})

describe('balance', () => {
  test('the sequence loss is 1 for uniform routing, and E / K for a collapse onto K of E experts', async () => {
    // Token t prefers experts t and t + 1 of 4, in turn.
    const uniform = tensor(
      Array.from({ length: 16 }, (_, i) => (((i % 4) - Math.floor(i / 4) + 4) % 4 < 2 ? 0.9 : 0.1)),
      [4, 4],
    )
    expect(await sequenceBalanceLoss(uniform, 1, 2).item()).toBeCloseTo(1, 6)
    const collapsed = tensor(
      Array.from({ length: 16 }, (_, i) => (i % 4 < 2 ? 1 : 1e-9)),
      [4, 4],
    )
    expect(await sequenceBalanceLoss(collapsed, 1, 2).item()).toBeCloseTo(2, 6)
  })

  test('the bias moves against the load by γ, and stays unchanged with γ = 0', async () => {
    const bias = new Parameter(tensor([0, 0, 0, 0]), { trainable: false })
    const load = tensor(Int32Array.of(10, 2, 4, 0))
    updateBias(bias, load, { speed: 0.5 })
    expect(Array.from(await bias.values())).toEqual([-0.5, 0.5, 0, 0.5])
    updateBias(bias, load, { speed: 0 })
    expect(Array.from(await bias.values())).toEqual([-0.5, 0.5, 0, 0.5])
    updateBias(bias, load, { speed: 1, center: true })
    const values = Array.from(await bias.values())
    expect(values.reduce((a, b) => a + b, 0)).toBeCloseTo(0.5, 6)
  })

  test('auxiliary-loss-free balancing evens out a skewed gate', async () => {
    const random = new Random(2)
    const x = randn([1, 256, 8], random)
    const layer = new MoELayer(config8, { random, std: 0.5 })
    let vio = Number.POSITIVE_INFINITY
    for (let step = 0; step < 200; step++) {
      layer.forward(x, { training: true })
      vio = summarizeLoad(await (layer.load as Tensor).values()).maxVio
      if (step === 0) expect(vio).toBeGreaterThan(0.3)
      layer.updateBias({ speed: 0.01 })
    }
    expect(vio).toBeLessThan(0.1)
  })

  test('MaxVio is 0 for uniform loads, and N / K - 1 after a collapse', () => {
    expect(summarizeLoad([5, 5, 5, 5]).maxVio).toBe(0)
    expect(summarizeLoad([...new Array(8).fill(7), ...new Array(248).fill(0)]).maxVio).toBe(31)
    const collapsed = summarizeLoad([9, 9, 0, 0, 0, 0, 0, 0])
    expect(collapsed).toMatchObject({ maxVio: 3, dead: [2, 3, 4, 5, 6, 7], hot: [0, 1] })
    expect(summarizeLoad([3, 3]).entropy).toBeCloseTo(1, 12)
    const uneven = summarizeLoad([1, 3])
    expect(uneven.entropy).toBeCloseTo(2 - 0.75 * Math.log2(3), 12)
    expect(uneven.variation).toBeCloseTo(0.5, 12)
    expect(summarizeLoad([1, 0]).maxVio).toBe(1)
    expect(summarizeLoad([4])).toEqual({ maxVio: 0, variation: 0, entropy: 1, dead: [], hot: [] })
  })
})

const config8: RouterConfig = {
  hidden_size: 8,
  moe_intermediate_size: 6,
  n_routed_experts: 8,
  num_experts_per_tok: 2,
  n_shared_experts: 1,
  n_group: 4,
  topk_group: 2,
  routed_scaling_factor: 2.5,
}

describe('recomputation', () => {
  test('counts the loads of a training pass once, and evaluation does not count any', async () => {
    const random = new Random(8)
    const layer = new MoELayer(config8, { random, std: 0.5 })
    const x = randn([2, 5, 8], random)
    const total = async () => Array.from(await (layer.load as Tensor).values()).reduce((a, b) => a + b, 0)
    layer.forward(x)
    expect(layer.load).toBeNull()
    layer.forward(x, { training: true })
    expect(await total()).toBe(20)
    layer.forward(x, { training: true })
    expect(await total()).toBe(40)
    layer.updateBias()
    expect(layer.load).toBeNull()
    const out = checkpoint(input => layer.forward(input, { training: true }), x)
    backward(out.sum())
    expect(await total()).toBe(20)
    layer.updateBias()
  })

  test('gives the same gradients', async () => {
    const random = new Random(9)
    const layer = new MoELayer(config8, { random, std: 0.5 })
    const x = randn([1, 6, 8], random)
    backward(layer.forward(x).mul(2).sum())
    const plain = await (layer.gate.weight.grad as Tensor).values()
    for (const { parameter } of namedParameters(layer)) parameter.zeroGrad()
    backward(
      checkpoint(input => layer.forward(input), x)
        .mul(2)
        .sum(),
    )
    assertClose('gate', await (layer.gate.weight.grad as Tensor).values(), plain, tolerances.elementwise)
  })
})

test('inputs without a batch axis, or of another size, are rejected', () => {
  const sizes = { hidden_size: 8, moe_intermediate_size: 8, n_routed_experts: 4 }
  const layers = [new MoELayer({ ...sizes, num_experts_per_tok: 2 }), new CapacityMoE({ ...sizes, router: 'switch' })]
  for (const layer of layers)
    for (const shape of [
      [3, 8],
      [1, 3, 9],
    ])
      expect(() => layer.forward(randn(shape, new Random(1)))).toThrow(
        `${layer.constructor.name}: the input has shape [${shape}], expected [batch, time, 8]`,
      )
})

describe('gates', () => {
  const attrs = routerAttrs(config8)
  test('sum to the scaling factor, and do not change with a common offset of all biases', async () => {
    const logits = randn([20, 8], new Random(1))
    const zero = routerTopk(logits, tensor(new Float32Array(8)), attrs)
    const shifted = routerTopk(logits, tensor(new Float32Array(8).fill(6.9)), attrs)
    const sums = await zero.weights.sum(1).values()
    for (const sum of sums) expect(sum).toBeCloseTo(2.5, 5)
    expect(await shifted.indices.values()).toEqual(await zero.indices.values())
    expect(await shifted.weights.values()).toEqual(await zero.weights.values())
  })

  test('depend on bias differences below the resolution of bf16, because the bias is f32', async () => {
    const logits = tensor(new Float32Array(8), [1, 8])
    const bias = tensor([6.9, 6.9001, 6.9, 6.9, 6.9, 6.9, 6.9, 6.9002])
    const { indices } = routerTopk(logits, bias, { ...attrs, groups: 1, topGroups: 1 })
    expect(Array.from(await indices.values())).toEqual([7, 1])
  })

  test('report all problems of a configuration', () => {
    expect(() => new MoELayer({ ...config8, n_group: 3, num_experts_per_tok: 0 })).toThrow(
      /num_experts_per_tok = 0.*n_group = 3 does not divide/,
    )
    expect(() => new MoELayer({ ...config8, num_experts_per_tok: 5 })).toThrow(
      /exceeds the 4 experts of the kept groups/,
    )
    const invalid = {
      topk_method: 'hash',
      scoring_func: 'tanh',
      routed_scaling_factor: Number.NaN,
      n_shared_experts: -1,
    }
    expect(() => new MoELayer({ ...config8, ...invalid } as unknown as RouterConfig)).toThrow(
      /n_shared_experts = -1.*topk_method = "hash".*scoring_func = "tanh".*routed_scaling_factor = NaN/,
    )
  })
})

test('a copy of some experts has their weights, and is independent of them', async () => {
  const { experts } = new MoELayer(
    { hidden_size: 4, moe_intermediate_size: 3, n_routed_experts: 4, num_experts_per_tok: 2 },
    { random: new Random(1) },
  )
  const copy = experts.copyOf(1, 3)
  for (const name of ['gate_proj', 'up_proj', 'down_proj'] as const) {
    const all = await experts[name].values()
    expect(copy[name].shape).toEqual([2, ...experts[name].shape.slice(1)])
    expect(await copy[name].values()).toEqual(all.slice(12, 36))
  }
  const deferred = deferWeights(() => new Experts(4, 4, 3, { random: new Random(5) })).copyOf(1, 3)
  expect(deferred.up_proj.handle).toBe(null)
  await materialize(namedParameters(deferred))
  const drawn = await new Experts(4, 4, 3, { random: new Random(5) }).up_proj.values()
  expect(await deferred.up_proj.values()).toEqual(drawn.slice(12, 36))
  copy.up_proj.assign(tensor(new Float32Array(24), [2, 3, 4]))
  expect(Math.max(...(await experts.up_proj.values()))).toBeGreaterThan(0)
  experts.down_proj.trainable = false
  expect(experts.copyOf(0, 4).down_proj.trainable).toBe(false)
  addAdapters(experts, { rank: 2, targets: path => path.includes('up_proj') })
  expect(() => experts.copyOf(0, 2)).toThrow(/experts with adapters cannot be copied; merge the adapters first/)
})

test.each(['bf16', 'fp8', 'int8', 'int4'] as const)('experts stored in %s are copied as they are', async weights => {
  const make = () => new Experts(4, 32, 48, { random: new Random(5), weights })
  const whole = make()
  const deferred = deferWeights(make).copyOf(1, 3)
  expect(deferred.up_proj.handle).toBe(null)
  await materialize(namedParameters(deferred))
  for (const copy of [whole.copyOf(1, 3), deferred])
    for (const name of ['gate_proj', 'up_proj', 'down_proj'] as const) {
      const [of, from] = [copy[name], whole[name]].map(each => (each as QuantizedParameter).weight)
      expect(of.shape).toEqual([2, ...from.shape.slice(1)])
      for (const part of ['q', 'scale'] as const) {
        const all = (await from[part]?.data()) ?? new Uint8Array()
        expect((await of[part]?.data()) ?? new Uint8Array()).toEqual(all.slice(all.length / 4, (3 * all.length) / 4))
      }
    }
  const all = whole.copyOf(0, 4)
  all.up_proj.assign(zeros([4, 48, 32]))
  using before = (whole.up_proj as QuantizedParameter).dequantize()
  expect(Math.max(...(await before.values()))).toBeGreaterThan(0)
})

test('a copy of all experts leaves them as they are', async () => {
  const experts = new Experts(4, 4, 3, { random: new Random(1) })
  const weights = await experts.up_proj.values()
  const copy = experts.copyOf(0, 4)
  expect(await experts.up_proj.values()).toEqual(weights)
  expect(await copy.up_proj.values()).toEqual(weights)
  // An update in place.
  const [grad, m, v] = [full([4, 3, 4], 1), zeros([4, 3, 4]), zeros([4, 3, 4])]
  const attrs = { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0, step: 1 }
  copy.up_proj.assign(adamwStep(copy.up_proj, grad, m, v, full([], 1), attrs).param)
  const moved = [...weights].map(value => expect.closeTo(value - 0.1, 5))
  expect([...(await copy.up_proj.values())]).toEqual(moved)
  expect(await experts.up_proj.values()).toEqual(weights)
})

test('missing configurations and options, and unknown names, are rejected', () => {
  const config = { hidden_size: 4, moe_intermediate_size: 4, n_routed_experts: 4, num_experts_per_tok: 2 }
  const make = (...args: unknown[]) => expect(() => new (MoELayer as new (...args: unknown[]) => MoELayer)(...args))
  make().toThrow('MoELayer: expected an options object, got undefined; pass an object: { hidden_size,')
  make({ ...config, n_shared_expert: 1 }).toThrow(
    'MoELayer: unknown option n_shared_expert; did you mean n_shared_experts?',
  )
  make(config, { balancr: noBalance() }).toThrow('MoELayer: unknown option balancr; did you mean balancer?')
  make(config, { dropping: { device: 2 } }).toThrow('MoELayer dropping: unknown option device; did you mean devices?')
  make(config, null).toThrow('MoELayer: expected an options object, got null')
  expect(() => auxFree({ sped: 1 } as never)).toThrow('did you mean speed?')
  const layer = new MoELayer({ ...config, num_key_value_heads: 3 } as RouterConfig, { std: 0 })
  expect(() => layer.forward(zeros([1, 1, 4]), { trainig: true } as never)).toThrow('did you mean training?')
  disposeModule(layer)
})

test.each(['noaux_tc', 'greedy'] as const)('a layer with topk_method %s leaks no tensors', method => {
  const backend = referenceBackend()
  const { handles } = backend.stats()
  const config = { hidden_size: 4, moe_intermediate_size: 4, n_routed_experts: 4, num_experts_per_tok: 2 }
  const layer = new MoELayer({ ...config, topk_method: method, scoring_func: 'softmax' }, { backend })
  scope(() => layer.forward(full([1, 3, 4], 1, { backend }))).dispose()
  disposeModule(layer)
  expect(backend.stats().handles).toBe(handles)
})
