import { beforeEach, describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { ones, randn, tensor } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { MoeError } from '../errors.ts'
import { swiglu } from '../fused/swiglu.ts'
import { Linear, RmsNorm, SwigluMlp } from '../nn/layers.ts'
import { Module, namedParameters } from '../nn/module.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { readF64, referenceBackend } from '../reference/index.ts'
import { keep, scope } from '../scope.ts'
import { isRecording, noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { assertClose, tolerances } from '../testing/compare.ts'
import { backward, gradients } from './backward.ts'
import { cacheForRecompute, checkpoint, isRecomputing, withRecomputed } from './checkpoint.ts'
import { customGradient } from './custom-gradient.ts'
import { backwardInput } from './split.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})
const alive = () => backend.stats().handles
const parameter = (...values: number[]) => new Parameter(tensor(values))
const grad = (of: Parameter) => of.grad && Array.from(readF64(of.grad))

describe('checkpoint', () => {
  test('takes a synchronous function that returns a tensor', () => {
    const wrong = (fn: unknown) => () => checkpoint(fn as () => Tensor, ones([2]))
    expect(wrong(async (x: Tensor) => x)).toThrow(
      expect.objectContaining({ code: 'E_ATTR', message: expect.stringContaining('returned a promise') }),
    )
    expect(wrong(() => 3)).toThrow(
      expect.objectContaining({
        code: 'E_ATTR',
        message: expect.stringContaining('what the function returned is the number 3, not a tensor'),
      }),
    )
  })

  const make = () => {
    const random = new Random(3)
    return { mlp: new SwigluMlp(8, 32, { random, std: 0.5 }), x: randn([16, 8], random) }
  }

  test('gives the same values and gradients as without checkpointing', () => {
    const { mlp, x } = make()
    const input = new Parameter(x)
    const forward = (h: Tensor) => mlp.forward(h).mul(h)
    const plain = scope(() => keep(forward(input).detach()))
    scope(() => backward(forward(input).mul(3).sum()))
    const all = [input, ...namedParameters(mlp).map(({ parameter: p }) => p)]
    const expected = all.map(p => Float64Array.from(readF64(p.grad as Tensor)))
    for (const p of all) p.zeroGrad()
    scope(() => {
      const out = checkpoint(forward, input)
      assertClose('output', readF64(out), readF64(plain), tolerances.exact)
      backward(out.mul(3).sum())
    })
    for (const [i, p] of all.entries())
      assertClose(`gradient ${i}`, readF64(p.grad as Tensor), expected[i], tolerances.exact)
  })

  test('works between recorded ops, nested, and for several inputs', () => {
    const w = parameter(2)
    const v = parameter(3)
    const inner = (a: Tensor, b: Tensor) => checkpoint((c, d) => c.mul(d).mul(w), a, b)
    const out = checkpoint((a, b) => inner(a, b).add(a), w.mul(1), v.mul(1))
    backward(out.mul(10).sum())
    // out = w v w + w
    expect(grad(w)).toEqual([10 * (2 * 2 * 3 + 1)])
    expect(grad(v)).toEqual([40])
  })

  test('uses less memory between forward and backward pass', () => {
    const { mlp, x } = make()
    const bytes = (forward: () => Tensor) =>
      scope(() => {
        const before = backend.stats().bytes
        forward()
        return backend.stats().bytes - before
      })
    const plain = bytes(() => mlp.forward(mlp.forward(x)))
    const checkpointed = bytes(() => checkpoint(h => mlp.forward(mlp.forward(h)), x))
    expect(checkpointed).toBeLessThan(plain / 4)
  })

  test('isRecomputing is true only during the second run', () => {
    const w = parameter(2)
    const log: boolean[] = []
    const out = checkpoint(() => {
      log.push(isRecomputing())
      return w.mul(w)
    })
    expect(isRecomputing()).toBe(false)
    backward(out.sum())
    expect(isRecomputing()).toBe(false)
    expect(log).toEqual([false, true])
    noGrad(() => checkpoint(() => w.mul(w)))
    expect(log).toHaveLength(2)
  })

  test('cacheForRecompute returns the same values in the second run, also in nested checkpoints', async () => {
    const w = parameter(2)
    let state = 0
    const log: number[] = []
    const next = () => {
      const value = cacheForRecompute(() => ++state)
      log.push(value)
      return w.mul(value)
    }
    const first = checkpoint(() => next().add(checkpoint(() => next().add(next()))))
    const second = checkpoint(next)
    next()
    expect(log.splice(0)).toEqual([1, 2, 3, 4, 5])
    backward(first.add(second).sum())
    // The last block runs again first; the inner one of the other block runs three times.
    expect(log.splice(0)).toEqual([4, 1, 2, 3, 2, 3])
    expect(state).toBe(5)
    next()
    expect(log).toEqual([6])
    expect(Array.from(await (w.grad as Tensor).values())).toEqual([1 + 2 + 3 + 4])
  })

  test('leaves no handle behind, inside and outside a scope', () => {
    const { mlp, x } = make()
    const before = alive()
    const step = () => {
      const loss = checkpoint(h => mlp.forward(h), x).mean()
      backward(loss)
      return loss
    }
    scope(() => {
      step()
    })
    for (const { parameter: p } of namedParameters(mlp)) p.zeroGrad()
    expect(alive()).toBe(before)
    const w = parameter(2)
    const start = alive()
    const loss = checkpoint(() => w.mul(w)).sum()
    backward(loss)
    loss.dispose()
    w.zeroGrad()
    expect(alive()).toBe(start)
  })

  describe('gradients reach intermediate results that the function reads without taking them as inputs:', () => {
    const directly = (fn: (...inputs: Tensor[]) => Tensor, ...inputs: Tensor[]) => fn(...inputs)
    const nested: typeof directly = (fn, ...inputs) => checkpoint((...own) => checkpoint(fn, ...own), ...inputs)
    const straightThrough = (x: Tensor, y: Tensor) =>
      customGradient(
        (_x: Tensor, _y: Tensor) => ones([2]),
        ([dy]) => [dy, dy.mul(3)],
        x,
        y,
      )
    test.each<[string, (input: Tensor, outside: Tensor, other: Tensor) => Tensor]>([
      ['an operand', (x, outside) => x.mul(outside).exp()],
      ['an operand together with an input of the function', (x, outside, other) => x.mul(outside).add(other)],
      ['an input of a custom gradient', straightThrough],
      ['a result of the function', (_, outside) => outside],
    ])('%s', (_, use) => {
      const step = (through: typeof directly) => {
        const [v, w] = [parameter(1, 2), parameter(0.5, 0.25)]
        const handles = alive()
        scope(() => {
          const outside = v.mul(2)
          // Recorded before, and used after: its gradient arrives at `outside` last.
          const before = outside.exp()
          const input = w.mul(3)
          const out = through(x => use(x, outside, input), input)
          backward(before.mul(out).add(outside).sum())
        })
        const found = [grad(v), grad(w)]
        for (const p of [v, w]) p.zeroGrad()
        expect(alive()).toBe(handles)
        return found
      }
      expect(step(checkpoint)).toEqual(step(directly))
      expect(step(nested)).toEqual(step(directly))
    })

    test('an input of a nested checkpoint that does not read it', () => {
      const [v, w] = [parameter(1, 2), parameter(3, 4)]
      scope(() => {
        const outside = v.mul(2)
        const before = outside.exp()
        const out = checkpoint(x => checkpoint(a => a.mul(w), x, outside), w.mul(1))
        backward(before.log().mul(out).sum())
      })
      // log(exp(2v)) w^2
      expect(grad(v)?.map(Math.round)).toEqual([18, 32])
      expect(grad(w)?.map(Math.round)).toEqual([12, 32])
    })

    test('in the first part of backwardInput', () => {
      const w = parameter(0.5, 0.25)
      const x = tensor([1, 2])
      x.tracked = true
      scope(() => {
        const outside = x.mul(2)
        const out = checkpoint(h => h.mul(outside), w.mul(3))
        const { gradients: found, backwardWeight } = backwardInput([out], [x], [ones([2])])
        expect(Array.from(readF64(found[0] as Tensor))).toEqual([3, 1.5])
        backwardWeight()
      })
      expect(grad(w)).toEqual([6, 12])
    })
  })

  test('the function may return no tensor', () => {
    const before = alive()
    scope(() => expect(checkpoint(() => [], ones([2]))).toEqual([]))
    expect(alive()).toBe(before)
  })

  test('the function may return its inputs unchanged', () => {
    const [v, w] = [parameter(1, 2), parameter(3, 4)]
    scope(() => {
      const [same, other, again] = checkpoint((a, b) => [a, b.mul(2), a], v, w.mul(5))
      backward(same.add(other).add(again.mul(3)).sum())
    })
    scope(() => backward(checkpoint(a => a.reshape([2]), v).sum()))
    expect([grad(v), grad(w)]).toEqual([
      [5, 5],
      [10, 10],
    ])
  })

  test('passes on an error of the function and restores recording', () => {
    const w = parameter(2)
    let runs = 0
    const fail = () => {
      if (++runs === 2) throw new MoeError({ code: 'E_DATA', op: 'fn', problem: 'no' })
      return w.mul(2)
    }
    const out = checkpoint(fail)
    expect(() => backward(out.sum())).toThrow(expect.objectContaining({ code: 'E_DATA' }))
    expect([isRecording(), isRecomputing()]).toEqual([true, false])
  })
})

describe('a checkpoint with several results', () => {
  test('adds the gradients of all results that are used; integers have none', () => {
    const w = parameter(2, 3)
    const [square, order, cube] = checkpoint(x => [x.mul(w), x.topk(1).indices, x.mul(w).mul(w)] as const, w.mul(1))
    expect([square.tracked, order.tracked, cube.tracked]).toEqual([true, false, true])
    backward(square.sum().add(cube.mul(10).sum()))
    expect(grad(w)).toEqual([2 * 2 + 10 * 3 * 4, 2 * 3 + 10 * 3 * 9])
    const v = parameter(5)
    const [unused, used] = checkpoint(() => [v.mul(2), v.mul(3)])
    backward(used.sum())
    expect(grad(v)).toEqual([3])
    unused.dispose()
  })

  test('the error names a result that is not a tensor', () => {
    expect(() => checkpoint((x: Tensor) => [x, 3] as never, ones([2]))).toThrow(
      /returned is the number 3, not a tensor/,
    )
  })
})

/** x + down(swiglu(gate(norm(x)), up(norm(x)))), with the results of norm and activation saved, or if `lean` recomputed. */
class Net extends Module {
  norm = new RmsNorm(6)
  gate: Linear
  up: Linear
  down: Linear
  readonly lean: boolean

  constructor(lean: boolean) {
    super()
    this.lean = lean
    const [a, b, c] = ['a', 'b', 'c'].map(name => ({ random: new Random(1).fork(name), std: 0.7 }))
    this.gate = new Linear(6, 10, a)
    this.up = new Linear(6, 10, b)
    this.down = new Linear(10, 6, c)
  }

  forward(x: Tensor): Tensor {
    const { lean, norm } = this
    // The products fold the leading axes, which creates reshapes of these tensors.
    const inner = (n: Tensor) => {
      const [g, u] = [this.gate.forward(n), this.up.forward(n)]
      return lean
        ? withRecomputed(
            (...of) => [swiglu(of[0], of[1])],
            h => this.down.forward(h),
            g,
            u,
          )
        : this.down.forward(swiglu(g, u))
    }
    return x.add(lean ? withRecomputed(of => [norm.forward(of)], inner, x) : inner(norm.forward(x)))
  }
}

describe('withRecomputed', () => {
  const input = () => {
    const x = randn([2, 5, 6], new Random(2))
    x.tracked = true
    return x
  }
  const dy = () => randn([2, 5, 6], new Random(3))
  const gradientsOf = (module: Module) => namedParameters(module).map(({ parameter }) => grad(parameter))

  test('gives the same results and gradients as without it, and saves half as much memory for the backward pass', () => {
    const [plain, lean] = [false, true].map(isLean => {
      const net = new Net(isLean)
      return scope(() => {
        const x = input()
        const before = backend.stats().bytes
        const y = net.forward(net.forward(x))
        const saved = backend.stats().bytes - before
        const [dx] = gradients(y, [x], { gradient: dy(), retainGraph: true })
        const out = readF64(y)
        backward(y, { gradient: dy() })
        return { out, dx: readF64(dx as Tensor), of: gradientsOf(net), saved }
      })
    })
    expect({ ...lean, saved: 0 }).toEqual({ ...plain, saved: 0 })
    // On this backend, the norm and the activation are separate ops, whose results are kept without recomputation.
    expect(lean.saved).toBeLessThan(plain.saved / 2)
  })

  test('leaves no handle behind, after a backward pass, without one, or after a failure', () => {
    const net = new Net(true)
    const before = alive()
    const run = (how: (y: Tensor) => void) => {
      scope(() => {
        how(net.forward(net.forward(input())))
      })
      for (const { parameter } of namedParameters(net)) parameter.zeroGrad()
      expect(alive()).toBe(before)
    }
    run(() => undefined)
    run(y => backward(y, { gradient: dy() }))
    run(y => {
      backward(y, { gradient: dy(), retainGraph: true })
      backward(y, { gradient: dy() })
    })
    noGrad(() => run(() => undefined))
    // Something was freed between the second runs of the two networks.
    const w = parameter(1)
    const start = alive()
    scope(() => {
      const middle = net.forward(input())
      const y = net.forward(middle.mul(w))
      middle.dispose()
      expect(() => backward(y, { gradient: dy() })).toThrow(/already freed/)
    })
    expect(alive()).toBe(start)
  })

  test('supports backwardInput, which defers the weight gradients of products', () => {
    const whole = new Net(false)
    const at = input()
    const [expected] = gradients(whole.forward(at), [at], { gradient: dy(), retainGraph: true })
    backward(whole.forward(input()), { gradient: dy() })
    const net = new Net(true)
    const x = input()
    const y = net.forward(x)
    // The first part runs in its own scope: what the second part needs must outlive it.
    const split = scope(() => backwardInput([y], [x], [dy()]))
    expect(readF64(split.gradients[0] as Tensor)).toEqual(readF64(expected as Tensor))
    expect(net.down.weight.grad).toBeNull()
    split.backwardWeight()
    expect(gradientsOf(net)).toEqual(gradientsOf(whole))
  })

  test('runs the first function twice and the second once', () => {
    const w = parameter(2)
    const log: string[] = []
    const note = (what: string) => log.push(isRecomputing() ? `${what} again` : what)
    const out = withRecomputed(
      x => {
        note('make')
        return [x.mul(w), x.mul(3)]
      },
      (a, b) => {
        note('use')
        return a.mul(b)
      },
      w.mul(1),
    )
    expect(log.splice(0)).toEqual(['make', 'use'])
    backward(out.sum())
    expect(log).toEqual(['make again'])
    // 3 w^3
    expect(grad(w)).toEqual([9 * 4])
  })

  test('does not free an input that is returned, but frees the others', () => {
    const w = parameter(2, 3)
    const kept: Tensor[] = []
    const out = withRecomputed(
      x => [x.mul(2), x.mul(3)],
      (a, b) => {
        kept.push(b)
        return a
      },
      w.mul(1),
    )
    expect(Array.from(readF64(out))).toEqual([4, 6])
    expect(() => kept[0].add(1)).toThrow(expect.objectContaining({ code: 'E_DISPOSED' }))
    backward(out.sum())
    expect(grad(w)).toEqual([2, 2])
  })

  test('passes on an error of the second run, and leaves no handle behind', () => {
    const w = parameter(2)
    const before = alive()
    let runs = 0
    scope(() => {
      const y = withRecomputed(
        x => {
          if (++runs === 2) throw new MoeError({ code: 'E_DATA', op: 'fn', problem: 'no' })
          return [x.mul(w)]
        },
        a => a.mul(a),
        w.mul(1),
      )
      expect(() => backward(y.sum())).toThrow(expect.objectContaining({ code: 'E_DATA' }))
    })
    expect([isRecording(), isRecomputing()]).toEqual([true, false])
    expect(alive()).toBe(before)
  })
})
