import { beforeEach, describe, expect, test } from 'vitest'
import { backward } from '../autograd/backward.ts'
import type { Backend } from '../backend.ts'
import { randn, tensor } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { type ErrorCode, isMoeError } from '../errors.ts'
import { swiglu } from '../fused/swiglu.ts'
import type { WeightFormat } from '../ops.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { readF64, referenceBackend } from '../reference/index.ts'
import { scope } from '../scope.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { assertClose, tolerances } from '../testing/compare.ts'
import { finiteDifference } from '../testing/finite-difference.ts'
import { type AdapterOptions, addAdapters, isFrozen, mergeAdapters, namedAdapters, removeAdapters } from './adapters.ts'
import { Embedding, Linear, OutputHead, RmsNorm, weightParameter } from './layers.ts'
import { Module, namedParameters, trainable, zeroGrad } from './module.ts'
import { denseWeight, groupedLinear, QuantizedParameter, quantizeWeights, weightVersion } from './quantized.ts'
import { stateDict } from './state-dict.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

const [hidden, inner] = [8, 6]

/** A custom block with stacked experts, a buffer, and everything else that a layer may have. */
class Experts extends Module {
  up_proj: Parameter
  down_proj: Parameter
  override readonly quantizable = ['up_proj', 'down_proj']
  override readonly stacked = {
    up_proj: (i: number) => `${i}.up_proj.weight`,
    down_proj: (i: number) => `${i}.down_proj.weight`,
  }
  constructor(random: Random) {
    super()
    const init = { random, std: 0.5 }
    this.up_proj = weightParameter([3, inner, hidden], 'up_proj', init)
    this.down_proj = weightParameter([3, hidden, inner], 'down_proj', init)
  }
  forward(x: Tensor, offsets: Tensor): Tensor {
    const up = groupedLinear(x, this.up_proj, offsets)
    return groupedLinear(swiglu(up, up), this.down_proj, offsets)
  }
}

class Block extends Module {
  embed: Embedding
  norm = new RmsNorm(hidden)
  mix: Linear
  experts: Experts
  bias = new Parameter(randn([hidden], new Random(8)), { trainable: false })
  head: OutputHead
  constructor() {
    super()
    const init = { random: new Random(1), std: 0.5 }
    this.embed = new Embedding(9, hidden, init)
    this.mix = new Linear(hidden, hidden, init)
    this.experts = new Experts(new Random(2))
    this.head = new OutputHead(hidden, 9, init)
  }
  /** Logits `[2, 3, 9]`. */
  forward(): Tensor {
    const ids = tensor(Int32Array.of(1, 5, 3, 8, 0, 2), [2, 3])
    const offsets = tensor(Int32Array.of(0, 2, 2, 6), [4])
    const x = this.mix.forward(this.norm.forward(this.embed.forward(ids)))
    const y = this.experts.forward(x.reshape([6, hidden]), offsets).reshape(x.shape)
    return this.head.forward(y.add(x).add(this.bias))
  }
  /** A scalar that depends on every logit in a different way. */
  loss(): Tensor {
    const logits = this.forward()
    return logits
      .mul(randn(logits.shape, new Random(4)))
      .mul(logits)
      .sum()
  }
}

/** Adds adapters with random values, as after training. */
function adapted(options: AdapterOptions = {}, block = new Block()): Block {
  addAdapters(block, { rank: 2, alpha: 3, ...options })
  for (const [i, { adapter }] of namedAdapters(block).entries())
    adapter.up.assign(randn(adapter.up.shape, new Random(50 + i), { std: 0.3 }))
  return block
}

const logitsOf = (block: Block) => scope(() => noGrad(() => block.forward())).values()
const names = (block: Block) => namedAdapters(block).map(({ name }) => name)
const rejectionOf = (fn: () => void, code: ErrorCode = 'E_CONFIG') => {
  try {
    fn()
  } catch (error) {
    if (isMoeError(error, code)) return error.message
    throw error
  }
  throw new Error('expected an error')
}

describe('addAdapters', () => {
  test('adapts linear layers and experts but neither head nor embedding, and freezes everything else', () => {
    const block = new Block()
    addAdapters(block)
    expect(names(block)).toEqual(['mix.weight', 'experts.up_proj', 'experts.down_proj'])
    expect(trainable(block)).toEqual(namedAdapters(block).flatMap(({ adapter: { down, up } }) => [down, up]))
    expect(isFrozen(block.bias)).toBe(true)
    const { down, up, scale } = block.experts.up_proj.adapter as never as {
      down: Parameter
      up: Parameter
      scale: number
    }
    expect([down.shape, up.shape, scale]).toEqual([[3, 16, hidden], [3, inner, 16], 2])
  })

  test('names adapter matrices like PEFT', () => {
    const keys = stateDict(adapted({ targets: ['mix', 'experts.up_proj'] }))
      .map(({ name, shape }) => `${name} ${shape}`)
      .filter(name => name.includes('lora'))
    expect(keys).toEqual([
      'mix.lora_A.weight 2,8',
      'mix.lora_B.weight 8,2',
      ...[0, 1, 2].map(i => `experts.${i}.up_proj.lora_A.weight 2,8`),
      ...[0, 1, 2].map(i => `experts.${i}.up_proj.lora_B.weight 6,2`),
    ])
    expect(names(adapted({}, new Block()))).not.toContain('head.weight')
    const single = new Linear(3, 2)
    addAdapters(single)
    expect(namedParameters(single).map(({ name }) => name)).toEqual(['weight', 'lora_A.weight', 'lora_B.weight'])
  })

  test('matches targets with the ends of paths', () => {
    expect(names(adapted({ targets: ['up_proj', 'head'] }))).toEqual(['experts.up_proj', 'head.weight'])
    expect(names(adapted({ targets: path => path.startsWith('experts.') }))).toEqual([
      'experts.up_proj',
      'experts.down_proj',
    ])
    rejectionOf(() => adapted({ targets: () => false }))
    const message = rejectionOf(() => adapted({ targets: ['up_proj', 'p_proj', 'embed', 'norm'] }))
    expect(message).toContain('no weight is named p_proj, embed, norm')
    expect(message).toContain('mix, up_proj, down_proj, head')
  })

  test.each([
    { rank: 0 },
    { rank: 1.5 },
    { rank: Number.NaN },
    { alpha: 0 },
    { alpha: Number.POSITIVE_INFINITY },
    { targets: [] },
  ])('rejects %o and changes nothing', options => {
    const block = new Block()
    rejectionOf(() => addAdapters(block, options))
    expect(names(block)).toEqual([])
    expect(trainable(block).length).toBeGreaterThan(0)
  })

  test('rejects a second set of adapters, and a module without weights to adapt', () => {
    rejectionOf(() => addAdapters(adapted()))
    rejectionOf(() => addAdapters(new RmsNorm(3)))
    rejectionOf(() => addAdapters(new Embedding(3, 4)))
  })

  test('rejects a head that shares its weight with an embedding', () => {
    const block = new Block()
    block.head.weight.dispose()
    block.head.weight = block.embed.weight
    rejectionOf(() => addAdapters(block, { targets: ['head'] }))
  })
})

test('new adapters do not change the output, bit for bit', async () => {
  const block = new Block()
  const before = await logitsOf(block)
  addAdapters(block)
  expect(await logitsOf(block)).toEqual(before)
})

test('the same seed gives the same A, and another seed or weight a different one', async () => {
  const start = async (seed: number) => {
    const block = new Block()
    addAdapters(block, { random: new Random(seed) })
    return Promise.all(namedAdapters(block).map(({ adapter }) => adapter.down.values()))
  }
  const [first, again, other] = [await start(1), await start(1), await start(2)]
  expect(again).toEqual(first)
  expect(other).not.toEqual(first)
  expect(first[0].slice(0, 9)).not.toEqual(first[1].slice(0, 9))
  for (const [i, columns] of [hidden, hidden, inner].entries()) {
    const bound = 1 / Math.sqrt(columns)
    const peak = Math.max(...first[i].map(Math.abs))
    expect(peak).toBeLessThanOrEqual(bound)
    expect(peak).toBeGreaterThan(0.9 * bound)
  }
})

const bases: ReadonlyArray<WeightFormat | 'f32'> = ['f32', 'bf16', 'fp8', 'int8', 'int4']

describe.each(bases)('adapters of weights in %s', format => {
  const make = async (): Promise<Block> => {
    const block = adapted({ targets: ['mix', 'up_proj', 'down_proj', 'head'] })
    if (format !== 'f32') await quantizeWeights(block, format)
    return block
  }

  test('gradients equal finite differences', async () => {
    const block = await make()
    scope(() => backward(block.loss()))
    expect(namedAdapters(block).length).toBe(4)
    for (const { name, adapter } of namedAdapters(block)) {
      for (const parameter of [adapter.down, adapter.up]) {
        const expected = finiteDifference(parameter, () => scope(() => noGrad(() => readF64(block.loss())[0])))
        assertClose(name, await (parameter.grad as Tensor).values(), expected, { relative: 1e-5, absolute: 1e-5 })
      }
    }
    for (const { parameter } of namedParameters(block)) if (!parameter.trainable) expect(parameter.grad).toBe(null)
  })

  test('outputs and gradients equal those of adapters of the dequantized weights', async () => {
    const block = await make()
    const dense = adapted({ targets: ['mix', 'up_proj', 'down_proj', 'head'] })
    for (const [i, { parameter }] of namedAdapters(block).entries()) {
      const to = namedAdapters(dense)[i].parameter
      if (parameter instanceof QuantizedParameter) to.assign(parameter.dequantize().detach())
    }
    dense.embed.weight.assign(
      block.embed.weight instanceof QuantizedParameter ? block.embed.weight.dequantize() : block.embed.weight.detach(),
    )
    expect(await logitsOf(block)).toEqual(await logitsOf(dense))
    scope(() => backward(block.loss()))
    scope(() => backward(dense.loss()))
    for (const [i, { adapter }] of namedAdapters(block).entries()) {
      const other = namedAdapters(dense)[i].adapter
      assertClose(
        'A',
        await (adapter.down.grad as Tensor).values(),
        await (other.down.grad as Tensor).values(),
        tolerances.exact,
      )
      assertClose(
        'B',
        await (adapter.up.grad as Tensor).values(),
        await (other.up.grad as Tensor).values(),
        tolerances.exact,
      )
    }
  })

  test('denseWeight is the effective weight, with its gradients', async () => {
    const { mix } = await make()
    const x = randn([5, hidden], new Random(3))
    const byProduct = () => x.matmul(denseWeight(mix.weight), { transposeB: true })
    assertClose('y', await scope(byProduct).values(), await scope(() => mix.forward(x)).values(), tolerances.sum)
    const gradients = async (y: () => Tensor) => {
      scope(() =>
        backward(
          y()
            .mul(randn([5, hidden], new Random(7)))
            .sum(),
        ),
      )
      const { down, up } = mix.weight.adapter as never as { down: Parameter; up: Parameter }
      const found = await Promise.all([down, up].map(({ grad }) => (grad as Tensor).values()))
      zeroGrad(mix)
      return found
    }
    const [own, expected] = [await gradients(byProduct), await gradients(() => mix.forward(x))]
    for (const i of [0, 1]) assertClose('gradient', own[i], expected[i], tolerances.gradient)
  })

  test('merging gives the same output up to the rounding of quantized weights', async () => {
    const block = await make()
    const before = await logitsOf(block)
    const target = await Promise.all(
      namedAdapters(block).map(({ parameter }) => scope(() => noGrad(() => denseWeight(parameter).detach())).values()),
    )
    const stored = namedAdapters(block).map(({ parameter }) => parameter)
    await mergeAdapters(block)
    expect(names(block)).toEqual([])
    if (format === 'f32') return assertClose('logits', await logitsOf(block), before, tolerances.sum)
    // The best result that the format allows is the quantized sum.
    for (const [i, parameter] of stored.entries()) {
      const shape = (parameter as QuantizedParameter).weight.shape
      const again = new Parameter(tensor(Float32Array.from(target[i]), shape))
      const holder = Object.assign(new Linear(1, 1), { weight: again })
      await quantizeWeights(holder, format)
      const expected = await (holder.weight as QuantizedParameter).dequantize().values()
      assertClose('weight', await (parameter as QuantizedParameter).dequantize().values(), expected, {
        relative: 1e-6,
        absolute: 1e-6,
      })
    }
  })
})

describe('merging and removing', () => {
  test('after merging, trainable parameters are trainable again, and buffers stay buffers', async () => {
    const before = trainable(new Block()).length
    const block = adapted()
    await mergeAdapters(block)
    expect(trainable(block).length).toBe(before)
    expect([block.bias.trainable, isFrozen(block.bias)]).toEqual([false, false])
    addAdapters(block)
  })

  test('removing restores the module, bit for bit', async () => {
    const expected = await logitsOf(new Block())
    const block = adapted()
    expect(await logitsOf(block)).not.toEqual(expected)
    removeAdapters(block)
    expect(await logitsOf(block)).toEqual(expected)
    expect(trainable(block).length).toBe(trainable(new Block()).length)
  })

  test('every change of a weight, of A or of B gives a new version, never a previous one', async () => {
    const block = new Block()
    const { weight } = block.mix
    const seen = new Set<number>([weightVersion(weight)])
    const changed = () => {
      const version = weightVersion(weight)
      expect(seen).not.toContain(version)
      seen.add(version)
    }
    for (let round = 0; round < 2; round++) {
      addAdapters(block, { rank: 2, targets: ['mix'] })
      changed()
      weight.adapter?.down.assign(randn([2, hidden], new Random(round)))
      changed()
      if (round === 0) removeAdapters(block)
      else await mergeAdapters(block)
      changed()
      weight.assign(weight.mul(2))
      changed()
    }
  })

  test('no tensor of an adapted layer leaks, recorded or not', async () => {
    const block = adapted()
    const x = randn([5, hidden], new Random(1))
    const { mix } = block
    const { handles } = backend.stats()
    // No scope, which would hide a leak.
    for (const result of [() => mix.forward(x), () => denseWeight(mix.weight)]) {
      const loss = result().sum()
      backward(loss)
      loss.dispose()
      zeroGrad(block)
    }
    expect(backend.stats().handles).toBe(handles)
    const results = noGrad(() => [mix.forward(x), denseWeight(mix.weight)])
    expect(backend.stats().handles).toBe(handles + results.length)
  })

  test('a recorded product saves one wide result, as without an adapter', () => {
    const layer = new Linear(4, 500)
    const x = randn([100, 4], new Random(1))
    x.tracked = true
    const savedPerElement = () => {
      const before = backend.stats().bytes
      const y = layer.forward(x)
      const { bytes } = backend.stats()
      backward(y.sum())
      return (bytes - before) / y.size
    }
    const plain = savedPerElement()
    addAdapters(layer, { rank: 2 })
    expect(savedPerElement()).toBeLessThan(plain * 1.1)
  })
})
