import { beforeEach, describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { randn } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { Linear, RmsNorm, SwigluMlp } from '../nn/layers.ts'
import { Module, namedParameters } from '../nn/module.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { readF64, referenceBackend } from '../reference/index.ts'
import { scope } from '../scope.ts'
import type { Tensor } from '../tensor.ts'
import { backward } from './backward.ts'
import { checkpoint } from './checkpoint.ts'
import { backwardInput } from './split.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})
const alive = () => backend.stats().handles

/**
 * A pipeline stage: h = x + mlp(norm(x)), and its own loss. The weight of `scaled` goes through an op before the
 * product.
 */
class Stage extends Module {
  norm: RmsNorm
  mlp: SwigluMlp
  scaled: Linear
  constructor() {
    super()
    const random = new Random(1)
    this.norm = new RmsNorm(6)
    this.mlp = new SwigluMlp(6, 10, { random })
    this.scaled = new Linear(6, 6, { random })
  }
  forward(x: Tensor): [Tensor, Tensor] {
    const h = x.add(this.mlp.forward(this.norm.forward(x)))
    const y = h.matmul(this.scaled.weight.mul(2), { transposeB: true })
    return [y, y.mul(y).mean()]
  }
}

const input = () => {
  const x = randn([5, 6], new Random(2))
  x.tracked = true
  return x
}
const gradientsOf = (module: Module) =>
  Object.fromEntries(
    namedParameters(module).map(({ name, parameter: { grad } }) => [name, grad && Array.from(readF64(grad))]),
  )

/** Returns the gradients of input and weights that `backward` computes. */
function whole(stage: Stage, dy: Tensor) {
  const x = new Parameter(randn([5, 6], new Random(2)))
  const [y, loss] = stage.forward(x)
  backward(y.mul(dy).sum().add(loss))
  return { dx: readF64(x.grad as Tensor), weights: gradientsOf(stage) }
}

describe('a backward pass in two parts', () => {
  test('computes the same gradients as backward, and leaves no handle behind', () => {
    const dy = randn([5, 6], new Random(3))
    const expected = whole(new Stage(), dy)
    const stage = new Stage()
    const before = alive()
    scope(() => {
      const x = input()
      const outputs = stage.forward(x)
      const recorded = alive()
      const { gradients, backwardWeight } = backwardInput(outputs, [x], [dy, null])
      expect(readF64(gradients[0] as Tensor)).toEqual(expected.dx)
      // Weights of products have no gradient yet; the norm's weight gets its gradient together with the input.
      const early = gradientsOf(stage)
      expect(early['norm.weight']).toEqual(expected.weights['norm.weight'])
      for (const name of ['mlp.gate_proj.weight', 'mlp.up_proj.weight', 'mlp.down_proj.weight', 'scaled.weight'])
        expect(early[name], name).toBeNull()
      // Now two gradients exist, four are deferred, and some intermediate results are freed.
      expect(alive()).toBeLessThan(recorded + 2 + 4 - 2)
      backwardWeight()
      expect(gradientsOf(stage)).toEqual(expected.weights)
      gradients[0]?.dispose()
    })
    for (const { parameter } of namedParameters(stage)) parameter.zeroGrad()
    expect(alive()).toBe(before)
  })

  test('gradients of several micro-batches add up, whatever the order of the second parts', () => {
    const dy = randn([5, 6], new Random(3))
    const { weights } = whole(new Stage(), dy)
    const stage = new Stage()
    const splits = [0, 1].map(() => {
      const x = input()
      return backwardInput(stage.forward(x), [x], [dy, null])
    })
    for (const split of splits.reverse()) split.backwardWeight()
    const found = gradientsOf(stage)
    for (const [name, values] of Object.entries(weights))
      expect(found[name], name).toEqual(values?.map(value => expect.closeTo(2 * value, 10)))
  })

  test('defers the weight gradients of products inside a checkpoint too', () => {
    const dy = randn([5, 6], new Random(3))
    const expected = whole(new Stage(), dy)
    const stage = new Stage()
    const before = alive()
    // The first part runs in its own scope: what the second part needs must outlive it.
    const x = input()
    const outputs = checkpoint(t => stage.forward(t), x)
    const { gradients, backwardWeight } = scope(() => backwardInput(outputs, [x], [dy, null]))
    expect(readF64(gradients[0] as Tensor)).toEqual(expected.dx)
    expect(gradientsOf(stage)['mlp.up_proj.weight']).toBeNull()
    expect(gradientsOf(stage)['norm.weight']).toEqual(expected.weights['norm.weight'])
    scope(backwardWeight)
    expect(gradientsOf(stage)).toEqual(expected.weights)
    for (const tensor of [x, dy, ...outputs, gradients[0]]) tensor?.dispose()
    for (const { parameter } of namedParameters(stage)) parameter.zeroGrad()
    expect(alive()).toBe(before - 1)
  })

  test('leaves no handle behind when cancelled', () => {
    const stage = new Stage()
    const before = alive()
    scope(() => {
      const x = input()
      const outputs = stage.forward(x)
      const made = alive()
      const split = backwardInput(outputs, [x], [outputs[0].detach(), null])
      split.dispose()
      split.dispose()
      expect(() => split.backwardWeight()).toThrow(/computed or cancelled/)
      expect(alive()).toBeLessThan(made)
      split.gradients[0]?.dispose()
    })
    for (const { parameter } of namedParameters(stage)) parameter.zeroGrad()
    expect(alive()).toBe(before)
  })

  test('an output may be an input itself', () => {
    const [x, before] = [input(), alive()]
    const seed = randn(x.shape, new Random(4))
    const { gradients, backwardWeight } = backwardInput([x], [x], [seed])
    expect(readF64(gradients[0] as Tensor)).toEqual(readF64(seed))
    backwardWeight()
    for (const t of [gradients[0], seed]) t?.dispose()
    expect(alive()).toBe(before)
  })

  test('some of the outputs may depend on nothing', () => {
    const [x, other] = [input(), randn([5, 6], new Random(4))]
    const outputs = [other.sum(), x.sum()]
    const { gradients } = backwardInput(outputs, [x])
    expect(readF64(gradients[0] as Tensor)).toEqual(new Float64Array(30).fill(1))
  })

  test('an input that nothing depends on has no gradient; invalid inputs are reported', () => {
    const stage = new Stage()
    const x = input()
    const other = input()
    expect(backwardInput([stage.forward(x)[1]], [x, other]).gradients[1]).toBeNull()
    expect(() => backwardInput([stage.forward(x)[1]], [x.add(1)])).toThrow(/intermediate result/)
    const untracked = randn([5, 6], new Random(2))
    expect(() => backwardInput([stage.forward(x)[1]], [untracked])).toThrow(/not tracked/)
    expect(() => backwardInput([stage.forward(x)[0]], [x])).toThrow(/shape \[5,6\]/)
    expect(() => backwardInput([untracked.sum()], [x])).toThrow(/no recorded trainable parameter/)
  })
})
