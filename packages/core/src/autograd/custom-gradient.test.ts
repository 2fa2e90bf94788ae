import { beforeEach, describe, expect, expectTypeOf, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { full, randn, tensor } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { Linear } from '../nn/layers.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { readF64, referenceBackend } from '../reference/index.ts'
import { scope } from '../scope.ts'
import { isRecording, noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { backward, gradients } from './backward.ts'
import { checkpoint } from './checkpoint.ts'
import { customGradient } from './custom-gradient.ts'
import { backwardInput } from './split.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})
const alive = () => backend.stats().handles
const parameter = (...values: number[]) => new Parameter(tensor(values))
const numbers = (of: Tensor | null) => of && Array.from(readF64(of))

/** Rounds to integers, and passes gradients through unchanged (Bengio et al. 2013). */
const straightThrough = (x: Tensor) =>
  customGradient(
    value => value.add(0.5).cast('i32').cast('f32'),
    ([gradient]) => [gradient],
    x,
  )

/** x * y, with the built-in and with a custom gradient. */
const product = (x: Tensor, y: Tensor) =>
  customGradient(
    (a, b) => a.mul(b),
    ([gradient], { inputs: [a, b], needs }) => [needs(0) ? gradient.mul(b) : null, needs(1) ? gradient.mul(a) : null],
    x,
    y,
  )

describe('customGradient', () => {
  test('runs the function, and uses the rule for its gradient', () => {
    const x = parameter(0.2, 1.7, 2.4)
    scope(() => {
      const y = straightThrough(x.mul(2))
      expect(numbers(y)).toEqual([0, 3, 5])
      backward(y.mul(tensor([1, 10, 100])).sum())
    })
    expect(numbers(x.grad)).toEqual([2, 20, 200])
  })

  test('changing the returned array changes no gradient, as with checkpoint', () => {
    const both = (a: Tensor) => [a.mul(2), a.mul(3)]
    for (const run of [
      (x: Tensor) => customGradient(both, ([first, second]) => [first.mul(2).add(second.mul(3))], x),
      (x: Tensor) => checkpoint(both, x),
    ]) {
      const x = parameter(1)
      scope(() => {
        const outputs = run(x) as Tensor[]
        const last = outputs.pop() as Tensor
        outputs.pop()
        backward(last.mul(10).sum())
      })
      expect(numbers(x.grad)).toEqual([30])
    }
  })

  test('gives the gradients of the built-in op, also in a checkpoint and with backwardInput', () => {
    const random = new Random(3)
    const [x, y] = [new Parameter(randn([4, 3], random)), new Parameter(randn([4, 3], random))]
    const linear = new Linear(3, 2, { random, std: 1 })
    const gradientsWith = (multiply: (a: Tensor, b: Tensor) => Tensor) =>
      scope(() => {
        const [dx, dy] = gradients(linear.forward(multiply(x, y).mul(x)).sum(), [x, y])
        return [numbers(dx), numbers(dy)]
      })
    const expected = gradientsWith((a, b) => a.mul(b))
    expect(gradientsWith(product)).toEqual(expected)
    expect(gradientsWith((a, b) => checkpoint(product, a, b))).toEqual(expected)
    const input = x.detach()
    input.tracked = true
    const split = backwardInput([linear.forward(product(input, y).mul(input)).sum()], [input])
    expect(numbers(split.gradients[0])).toEqual(expected[0])
    split.backwardWeight()
    expect(numbers(y.grad)).toEqual(expected[1])
  })

  test('the rule gets zeros for outputs that nothing depends on, including integers', () => {
    const x = parameter(3, 4)
    const seen: unknown[] = []
    scope(() => {
      const [norm, direction, sign] = customGradient(
        value => {
          const norm = value.mul(value).sum().sqrt()
          return [norm, value.div(norm), value.cast('i32')]
        },
        (gradients, { outputs }) => {
          seen.push(gradients.map(numbers), outputs.length)
          return [outputs[1].mul(gradients[0])]
        },
        x,
      )
      expect([numbers(norm), sign.dtype, direction.tracked, sign.tracked]).toEqual([[5], 'i32', true, false])
      backward(norm.mul(10))
    })
    expect(seen).toEqual([[[10], [0, 0], [0, 0]], 3])
    expect(numbers(x.grad)).toEqual([6, 8])
  })

  test('records nothing inside, can return inputs, and leaves no handle behind', () => {
    const [x, inside] = [parameter(2), parameter(5)]
    const before = alive()
    scope(() => {
      const y = customGradient(
        value => {
          expect(isRecording()).toBe(false)
          value.mul(inside)
          return value
        },
        ([gradient]) => [gradient.mul(7)],
        x,
      )
      backward(y.mul(3).sum())
    })
    expect([numbers(x.grad), inside.grad]).toEqual([[21], null])
    x.zeroGrad()
    expect(alive()).toBe(before)
  })

  test('without recording, only the function runs', () => {
    const rule = () => expect.unreachable()
    expect(scope(() => customGradient(x => x.mul(2), rule, full([], 2))).tracked).toBe(false)
    expect(noGrad(() => customGradient(x => x.mul(2), rule, parameter(1))).tracked).toBe(false)
    const x = parameter(1)
    scope(() => backward(product(x, tensor([3])).sum()))
    expect(numbers(x.grad)).toEqual([3])
  })

  test.each<[what: string, rule: unknown, code: string, message: RegExp]>([
    ['another shape', () => [full([3], 1)], 'E_SHAPE', /gradient of input 0 has shape \[3\], the input \[2\]/],
    ['too few gradients', () => [], 'E_SHAPE', /0 gradients for 1 inputs/],
    ['a tensor instead of a list', () => full([2], 1), 'E_SHAPE', /for 1 inputs/],
    ['a number instead of a tensor', () => [3], 'E_ATTR', /gradient of input 0/],
    ['integers', () => [tensor(Int32Array.of(1, 2))], 'E_DTYPE', /has dtype i32/],
  ])('rejects a rule that returns %s', (_, rule, code, message) => {
    const x = parameter(1, 2)
    const before = alive()
    const run = () => scope(() => backward(customGradient(value => value.mul(2), rule as () => [Tensor], x).sum()))
    expect(run).toThrow(expect.objectContaining({ code, message: expect.stringMatching(message) }))
    expect([x.grad, alive()]).toEqual([null, before])
  })

  test('rejects arguments that are not functions or tensors, and asynchronous functions', () => {
    const call =
      (...args: unknown[]) =>
      () =>
        (customGradient as (...args: unknown[]) => unknown)(...args)
    expect(call(tensor([1]), (x: Tensor) => x)).toThrow(/forward is .*pass two functions, then the inputs/s)
    expect(
      call(
        (x: Tensor) => x,
        () => [],
        3,
      ),
    ).toThrow(/an input is the number 3/)
    expect(
      call(
        async (x: Tensor) => x,
        () => [],
        tensor([1]),
      ),
    ).toThrow(/promise/)
  })

  test('types have as many gradients as there are inputs and outputs', () => {
    const [a, b] = [parameter(1, 2), parameter(3, 4)]
    const sumAndDifference = customGradient(
      (x, y) => [x.add(y), x.sub(y)],
      (gradients, { inputs, outputs }) => {
        for (const tuple of [gradients, inputs, outputs]) expectTypeOf(tuple).toEqualTypeOf<readonly [Tensor, Tensor]>()
        return [gradients[0], null]
      },
      a,
      b,
    )
    expectTypeOf(sumAndDifference).toEqualTypeOf<readonly [Tensor, Tensor]>()
    const doubled = customGradient(
      x => x.mul(2),
      ([gradient]) => [gradient.mul(2)],
      a,
    )
    expectTypeOf(doubled).toEqualTypeOf<Tensor>()
    const oneGradient = ([gradient]: readonly [Tensor]) => [gradient] as const
    // @ts-expect-error: one gradient for two inputs
    customGradient((x, y) => x.add(y), oneGradient, a, b)
    expectTypeOf(gradients(doubled.sum(), [a, b])).toEqualTypeOf<[Tensor | null, Tensor | null]>()
    expectTypeOf(checkpoint(x => [x.neg(), x.exp()], a)).toEqualTypeOf<readonly [Tensor, Tensor]>()
  })
})
