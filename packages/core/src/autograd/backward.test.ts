import { beforeEach, describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { ones, randn, tensor, zeros } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { Linear, RmsNorm, SwigluMlp } from '../nn/layers.ts'
import { namedParameters } from '../nn/module.ts'
import { Parameter } from '../parameter.ts'
import { setRows } from '../primitives.ts'
import { Random } from '../random.ts'
import { readF64, referenceBackend } from '../reference/index.ts'
import { keep, scope } from '../scope.ts'
import { isRecording, noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { assertClose } from '../testing/compare.ts'
import { backward, gradients } from './backward.ts'
import { customGradient } from './custom-gradient.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})
const alive = () => backend.stats().handles
const parameter = (...values: number[]) => new Parameter(tensor(values))
const grad = (of: Parameter) => Array.from(readF64(of.grad as Tensor))

describe('gradients of parameters', () => {
  test('add up over calls until zeroGrad', () => {
    const w = parameter(2, 3)
    backward(w.mul(w).sum())
    expect(grad(w)).toEqual([4, 6])
    backward(w.mul(10).sum())
    expect(grad(w)).toEqual([14, 16])
    w.zeroGrad()
    expect(w.grad).toBeNull()
    backward(w.mul(10).sum())
    expect(grad(w)).toEqual([10, 10])
  })

  test('a shared parameter accumulates the gradients of all uses', () => {
    const w = parameter(2, 3)
    const x = tensor([5, 7])
    // d/dw (w x + w^2 + sum over a reshaped w) = x + 2 w + 1
    const loss = w
      .mul(x)
      .add(w.mul(w))
      .add(w.reshape([2, 1]).reshape([2]))
      .sum()
    backward(loss)
    expect(grad(w)).toEqual([10, 14])
  })

  test('the same tensor on both sides of an op counts twice', () => {
    const w = parameter(3)
    backward(w.add(w).mul(w).sum())
    expect(grad(w)).toEqual([12])
  })

  test('a parameter that is the loss has gradient 1', () => {
    const w = parameter(3)
    backward(w)
    expect(grad(w)).toEqual([1])
  })

  test('buffers and detached values get no gradient', () => {
    const w = parameter(2)
    const frozen = new Parameter(tensor([3]), { trainable: false })
    backward(w.mul(frozen).add(w.detach().mul(7)).sum())
    expect(grad(w)).toEqual([3])
    expect(frozen.grad).toBeNull()
    frozen.trainable = true
    backward(w.mul(frozen).sum())
    expect(grad(frozen)).toEqual([2])
  })

  test('belong to no scope', () => {
    const w = parameter(2)
    scope(() => backward(w.mul(5).sum()))
    scope(() => backward(w.mul(5).sum()))
    expect(grad(w)).toEqual([10])
  })

  test('are 0 where a power has the exponent 0, also for 0', () => {
    const [w, e] = [parameter(0, 2), parameter(0, 0)]
    backward(w.pow(e).sum())
    expect(grad(w)).toEqual([0, 0])
    expect(grad(e)).toEqual([0, Math.log(2)])
  })

  test('no gradient flows through integers', () => {
    const w = parameter(1.5, 2.5)
    expect(w.cast('i32').tracked).toBe(false)
    expect(w.lt(2).tracked).toBe(false)
  })
})

describe('options', () => {
  test('gradient is the vector of a vector-Jacobian product', () => {
    const w = parameter(2, 3)
    const seed = tensor([10, 100])
    backward(w.mul(w), { gradient: seed })
    expect(grad(w)).toEqual([40, 600])
    expect(seed.disposed).toBe(false)
  })

  test('a loss that is not a scalar requires a gradient of its shape', () => {
    const w = parameter(2, 3)
    expect(() => backward(w.mul(w))).toThrow(
      expect.objectContaining({
        code: 'E_SHAPE',
        message: expect.stringMatching(/\[2\], expected a scalar; reduce it with .mean\(\)/),
      }),
    )
    expect(() => backward(w.mul(w), { gradient: tensor([1, 2, 3]) })).toThrow(
      expect.objectContaining({
        code: 'E_SHAPE',
        message: expect.stringMatching(/gradient has shape \[3\], the loss \[2\]/),
      }),
    )
    const integers = tensor(Int32Array.of(1, 2))
    expect(() => backward(w.mul(w), { gradient: integers })).toThrow(expect.objectContaining({ code: 'E_DTYPE' }))
    expect(() => backward(w.mul(w), { gradient: 2 as never })).toThrow(expect.objectContaining({ code: 'E_ATTR' }))
    expect(w.grad).toBeNull()
  })

  test('retainGraph allows a second backward pass, with the same numbers', () => {
    const w = parameter(2, 3)
    const loss = w.mul(w).mul(w).sum()
    backward(loss, { retainGraph: true })
    expect(grad(w)).toEqual([12, 27])
    backward(loss)
    expect(grad(w)).toEqual([24, 54])
  })

  test('without retainGraph, a second backward pass throws', () => {
    const w = parameter(2, 3)
    const twice = w.mul(w).sum()
    backward(twice)
    expect(() => backward(twice)).toThrow(
      expect.objectContaining({ code: 'E_NO_GRADIENT', message: expect.stringMatching(/retainGraph: true/) }),
    )
    const other = w.mul(w).sum()
    gradients(other, [w])
    expect(() => backward(other)).toThrow(expect.objectContaining({ code: 'E_NO_GRADIENT' }))
  })
})

describe('gradients()', () => {
  test('returns gradients of parameters and intermediate results, and does not set grad', () => {
    const w = parameter(2, 3)
    const h = w.mul(w)
    const [byW, byH, none] = gradients(h.mul(5).sum(), [w, h, parameter(1)])
    expect(Array.from(readF64(byW as Tensor))).toEqual([20, 30])
    expect(Array.from(readF64(byH as Tensor))).toEqual([5, 5])
    expect(none).toBeNull()
    expect(w.grad).toBeNull()
  })

  test('frees what it has found if a rule fails', () => {
    const [w, v] = [parameter(2), parameter(3)]
    const before = alive()
    const fails = (x: Tensor) =>
      customGradient(
        y => y.mul(2),
        () => {
          throw new Error('no')
        },
        x,
      )
    scope(() => expect(() => gradients(fails(w).add(v).sum(), [w, v])).toThrow('no'))
    expect(alive()).toBe(before)
  })

  test('returns 1 for the loss itself', () => {
    const w = parameter(2)
    const loss = w.mul(3).sum()
    expect(Array.from(readF64(gradients(loss, [loss])[0] as Tensor))).toEqual([1])
  })
})

describe('freed tensors', () => {
  const freed = expect.objectContaining({
    code: 'E_DISPOSED',
    message: expect.stringMatching(/already freed; .*(backward inside|return it from its scope)/),
  })

  test('backward of a loss that was returned from the scope of its forward pass throws', () => {
    const w = parameter(2, 3)
    // Sum and add need no elements of their inputs in the backward pass, but must not drop the gradient silently.
    const loss = scope(() => w.mul(2).add(1).sum())
    expect(() => backward(loss)).toThrow(freed)
    expect(w.grad).toBeNull()
  })

  test('backward through a disposed intermediate result throws', () => {
    const w = parameter(2, 3)
    const h = w.mul(w)
    const loss = h.sum()
    h.dispose()
    expect(() => backward(loss)).toThrow(freed)
    expect(w.grad).toBeNull()
  })

  test('backward through an intermediate result that another backward pass has freed throws', () => {
    const w = parameter(2, 3)
    const h = w.mul(w)
    const [a, b] = [h.sum(), h.mul(2).sum()]
    backward(a)
    expect(() => backward(b)).toThrow(freed)
    expect(grad(w)).toEqual([4, 6])
  })

  test('every use of a freed tensor throws', async () => {
    const x = tensor([1, 2])
    x.dispose()
    expect(() => x.add(1)).toThrow(freed)
    expect(() => ones([2]).add(x)).toThrow(freed)
    expect(() => x.detach()).toThrow(freed)
    await expect(x.data()).rejects.toMatchObject({ code: 'E_DISPOSED' })
    await expect(x.values()).rejects.toMatchObject({ code: 'E_DISPOSED' })
  })

  test('a value detached before backward survives it', async () => {
    const w = parameter(2, 3)
    const h = w.mul(w)
    const kept = h.detach()
    backward(h.sum())
    expect(h.disposed).toBe(true)
    expect(Array.from(await kept.values())).toEqual([4, 9])
  })

  test('the loss itself survives', async () => {
    const loss = parameter(2, 3).sum()
    backward(loss)
    expect(await loss.item()).toBe(5)
  })
})

describe('no gradient', () => {
  test('the error says that nothing was recorded', () => {
    const w = parameter(2)
    const noGradient = expect.objectContaining({
      code: 'E_NO_GRADIENT',
      message: expect.stringMatching(/depends on no recorded trainable parameter.*outside noGrad/),
    })
    expect(() => backward(tensor([1]).mul(2))).toThrow(noGradient)
    expect(() => backward(noGrad(() => w.mul(2)))).toThrow(noGradient)
    expect(() => backward(w.detach())).toThrow(noGradient)
    expect(() => gradients(tensor([1]).sum(), [w])).toThrow(noGradient)
  })

  test('source rows of setRows have none, and the failed backward pass leaves no state or memory behind', () => {
    const w = parameter(1, 2, 3)
    const source = parameter(9)
    const before = alive()
    scope(() => {
      const loss = setRows(w, tensor(Int32Array.of(1)), source)
        .mul(2)
        .sum()
      const attempt = () => backward(loss, { retainGraph: true })
      expect(attempt).toThrow(expect.objectContaining({ code: 'E_NO_GRADIENT', op: 'setRows' }))
      expect(isRecording()).toBe(true)
      // Gradients that were propagated before the failure must not be added in the next backward pass.
      source.trainable = false
      attempt()
    })
    expect(grad(w)).toEqual([2, 0, 2])
    w.zeroGrad()
    expect(alive()).toBe(before)
  })
})

describe('memory', () => {
  test('outside a scope, intermediate results are freed; the loss and the gradients stay', () => {
    const w = parameter(2, 3)
    const x = tensor([1, 1])
    const before = alive()
    const loss = w.mul(x).add(1).mul(w).mean()
    backward(loss)
    expect(alive()).toBe(before + 2)
    loss.dispose()
    w.zeroGrad()
    expect(alive()).toBe(before)
  })

  test('in a scope, no step leaves a handle behind', () => {
    const random = new Random(1)
    const mlp = new SwigluMlp(4, 8, { random })
    const norm = new RmsNorm(4)
    const x = randn([3, 4], random)
    const before = alive()
    for (let step = 0; step < 3; step++) {
      scope(() => backward(mlp.forward(norm.forward(x)).mean()))
      for (const { parameter } of [...namedParameters(mlp), ...namedParameters(norm)]) {
        expect(parameter.grad).not.toBeNull()
        parameter.zeroGrad()
      }
      expect(alive()).toBe(before)
    }
  })

  test('gradients of intermediate results are freed during the backward pass', () => {
    const w = parameter(...new Float32Array(1000).fill(0.5))
    const elements = 1000 * 8
    let h: Tensor = w
    for (let i = 0; i < 50; i++) h = h.mul(w)
    const loss = h.sum()
    const recorded = backend.stats().bytes
    backward(loss)
    // One gradient per op at a time, not fifty.
    expect(backend.stats().peakBytes - recorded).toBeLessThan(8 * elements)
  })
})

test('gradients of 200 random graphs equal finite differences', () => {
  for (let seed = 0; seed < 200; seed++) {
    const random = new Random(seed)
    const w = new Parameter(tensor(random.normal(6), [2, 3]))
    const steps = Array.from({ length: 6 }, () => [random.integer(7), random.next(), random.next()])
    const build = () => {
      const pool: Tensor[] = [w]
      for (const [op, a, b] of steps) {
        const x = pool[Math.floor(a * pool.length)]
        const y = pool[Math.floor(b * pool.length)]
        const choices = [
          () => x.add(y),
          () => x.mul(y).tanh(),
          () => x.sub(y.mean(1, true)),
          () => x.matmul(y, { transposeA: true }).tanh().slice([0, 0], [2, 3]),
          () => x.permute([1, 0]).reshape([2, 3]).sigmoid(),
          () => x.cumsum(1).mul(0.3),
          () => x.narrow(1, 1, 2).expand([2, 3]).mul(y),
        ]
        pool.push(choices[op]())
      }
      return pool[pool.length - 1].sum()
    }
    scope(() => {
      const loss = build()
      if (loss.node !== null) backward(loss)
    })
    const found = Float64Array.from(readF64(w.grad ?? zeros([2, 3])))
    const data = readF64(w)
    const expected = Float64Array.from(data, (value, i) => {
      const at = (x: number) => {
        data[i] = x
        return scope(() => readF64(build())[0])
      }
      const slope = (at(value + 1e-5) - at(value - 1e-5)) / 2e-5
      data[i] = value
      return slope
    })
    assertClose(`seed ${seed}`, found, expected, { relative: 1e-5, absolute: 1e-6 })
  }
})

test('gradient descent on a linear model reaches its target', () => {
  const random = new Random(2)
  const model = new Linear(3, 1, { random })
  const x = randn([20, 3], random)
  const y = x.matmul(tensor([1, -2, 3], [3, 1]))
  for (let step = 0; step < 300; step++) {
    scope(() => {
      const error = model.forward(x).sub(y)
      backward(error.mul(error).mean())
      noGrad(() => model.weight.assign(keep(model.weight.sub((model.weight.grad as Tensor).mul(0.1)))))
      model.weight.zeroGrad()
    })
  }
  assertClose('weight', readF64(model.weight), [1, -2, 3], { relative: 0, absolute: 1e-3 })
})
