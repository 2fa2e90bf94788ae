/** @file The kinds of steps of random programs. */
import { checkpoint, withRecomputed } from '../../autograd/checkpoint.ts'
import { customGradient } from '../../autograd/custom-gradient.ts'
import { concat, scatterAddRows, setRows, where } from '../../primitives.ts'
import { scope } from '../../scope.ts'
import { noGrad } from '../../tape.ts'
import type { Tensor } from '../../tensor.ts'
import {
  axesOf,
  below,
  count,
  factors,
  flip,
  like,
  matrix,
  maxSize,
  one,
  partner,
  randomShape,
  rows,
  type StepFunction,
  size,
} from './choices.ts'
import { fusedSteps } from './fused-steps.ts'

/** All kinds of steps, by name. */
export const steps = {
  leaf: c => c.parameter(randomShape(c)),
  unary(c) {
    const x = c.pick()
    return one<() => Tensor>(c, [
      () => x.neg(),
      () => x.abs(),
      () => x.sign(),
      () => x.tanh().exp(),
      () => x.abs().add(0.5).log(),
      () => x.abs().add(0.1).sqrt(),
      () => x.mul(x).add(0.5).rsqrt(),
      () => x.sin(),
      () => x.cos(),
      () => x.tanh(),
      () => x.sigmoid(),
      () => x.floor(),
    ])()
  },
  binary(c) {
    const x = c.pick()
    const y = partner(c, x)
    const [a, b] = flip(c) ? [x, y] : [y, x]
    return one<() => Tensor>(c, [
      () => a.add(b),
      () => a.sub(b),
      () => a.mul(b),
      () => a.div(b.abs().add(0.5)),
      () => a.maximum(b),
      () => a.minimum(b),
      () => a.abs().add(0.5).pow(b.tanh()),
      () => where(a.lt(b), a, b.mul(2)),
      () => where(a.le(0), b, a),
      () => a.mul(0.5).add(a),
      () => a.mul(a),
    ])()
  },
  reduce(c) {
    const x = c.pick()
    const axes = axesOf(c, x)
    const keep = flip(c)
    return one<() => Tensor>(c, [
      () => x.sum(axes, keep),
      () => x.mean(axes, keep),
      () => (x.size === 0 ? x : x.max(axes, keep)),
      () => (x.rank === 0 ? x : x.cumsum(below(c, x.rank))),
      () => x.sum(),
    ])()
  },
  topk(c) {
    const x = rows(c)
    return x.topk(1 + below(c, x.shape[1])).values
  },
  reshape: c => {
    const x = c.pick()
    return x.reshape(factors(c, x.size))
  },
  move(c) {
    const x = c.pick()
    return one<() => Tensor>(c, [
      () => x.permute(c.random.shuffle(x.shape.map((_, i) => i))),
      () => {
        const starts = x.shape.map(n => below(c, n + 1))
        return x.slice(
          starts,
          x.shape.map((n, i) => below(c, n - starts[i] + 1)),
        )
      },
      () => {
        if (x.rank === 0) return x
        const axis = below(c, x.rank)
        const n = x.shape[axis]
        const start = below(c, n + 1)
        return x.narrow(axis, start, start + below(c, n - start + 1))
      },
      () => {
        if (x.size > maxSize) return x
        const [before, after] = [x.shape.map(() => below(c, 3)), x.shape.map(() => below(c, 3))]
        return x.pad(before, after, one(c, [0, 1.5]))
      },
      () => {
        const shape = x.shape.map(n => (n === 1 ? one(c, [1, 2, 5]) : n))
        return x.size > maxSize ? x : x.expand(flip(c) ? [2, ...shape] : shape)
      },
      () =>
        x.rank === 0 || x.size > maxSize
          ? x
          : concat([x, x, like(c, x.shape)].slice(0, 2 + below(c, 2)), below(c, x.rank)),
    ])()
  },
  rows(c) {
    const x = rows(c)
    const [n, features] = x.shape
    return one<() => Tensor>(c, [
      () =>
        x.takeRows(
          c.integers(
            randomShape(c, 1 + below(c, 2)).map(k => Math.min(k, 9)),
            -1,
            n + 1,
          ),
        ),
      () => scatterAddRows(c.integers([n], -1, 6), x, 5),
      () => setRows(x, c.integers([3], -1, n + 1), c.integers([3, features], -2, 3).cast('f32')),
    ])()
  },
  donate(c) {
    const x = rows(c)
    const [n, features] = x.shape
    const given = flip(c) ? x.detach() : x.detach().mul(2)
    const source = c.integers([2, features], -2, 3).cast('f32')
    return setRows(given, c.integers([2], -1, n + 1), source, { donate: true }).add(x)
  },
  detach: c => c.pick().detach(),
  integers(c) {
    const a = c.integers(randomShape(c, 2), -5, 6)
    const b = c.integers([a.shape[1]], -3, 4)
    return noGrad(() =>
      a
        .div(b)
        .add(a.cumsum(below(c, 2)))
        .mul(b.maximum(a))
        .sub(a.lt(b).cast('i32'))
        .cast('f32'),
    )
  },
  cast(c) {
    const x = c.pick()
    const dtypes = (['bf16', 'f16', 'f8e4m3', 'f32'] as const).filter(dtype => c.dtypes.has(dtype))
    return x.cast(one(c, dtypes)).cast('f32')
  },
  matmul(c) {
    const x = c.pick()
    if (x.rank < 2 || flip(c)) {
      const a = matrix(x)
      const [transposeA, transposeB] = [flip(c), flip(c)]
      const k = a.shape[transposeA ? 0 : 1]
      const n = size(c)
      return a.matmul(like(c, transposeB ? [n, k] : [k, n]), { transposeA, transposeB }).mul((k || 1) ** -0.5)
    }
    const [transposeA, transposeB] = [flip(c), flip(c)]
    const k = x.shape[x.rank - (transposeA ? 2 : 1)]
    const n = below(c, 12)
    const lead = transposeA || flip(c) ? x.shape.slice(0, -2) : []
    return x
      .matmul(like(c, [...lead, ...(transposeB ? [n, k] : [k, n])]), { transposeA, transposeB })
      .mul((k || 1) ** -0.5)
  },
  customGradient(c) {
    return customGradient(
      (a, b) => [a.mul(2).add(b.sum().tanh()), b.sum().tanh()] as const,
      ([gradient, last], { inputs: [a, b], outputs: [, t] }) => [
        gradient.mul(2).reshape(a.shape),
        gradient
          .sum()
          .add(last)
          .mul(t.mul(t).neg().add(1))
          .reshape(b.shape.map(() => 1))
          .expand(b.shape),
      ],
      c.pick(),
      c.pick(),
    )
  },
  checkpoint(c) {
    const inputs = [c.pick(), c.pick()]
    const returned = one(c, [1, 1, 2, 9])
    const fn = (...own: Tensor[]) => c.body(own).slice(-returned)
    const identity = c.random.integer(8) === 0
    const whole = identity ? (...own: Tensor[]) => [...fn(...own), own[1], inputs[0]] : fn
    return c.recompute ? checkpoint(whole, ...inputs) : whole(...inputs)
  },
  withRecomputed(c) {
    const x = rows(c)
    const weight = like(c, [x.shape[1], count(c)])
    const make = (own: Tensor) => [own.tanh(), own.mul(2)] as const
    const use = (a: Tensor, b: Tensor) =>
      a
        .reshape([...a.shape, 1])
        .reshape(a.shape)
        .matmul(weight)
        .add(b.matmul(weight))
        .mul(0.2)
    return c.recompute ? withRecomputed(make, use, x) : use(...make(x))
  },
  unrecorded: c => noGrad(() => scope(() => c.body([c.pick(), c.pick()]))),
  ...fusedSteps,
} as const satisfies Readonly<Record<string, StepFunction>>

/** Name of a kind of step. */
export type StepKind = keyof typeof steps

/** Kinds that run steps of their own. */
export const nesting: ReadonlySet<StepKind> = new Set(['checkpoint', 'unrecorded'])

/** Kinds whose results change a lot if a rounding error crosses the limit between two values. */
export const coarse: ReadonlySet<StepKind> = new Set(['cast', 'quantized', 'quantizedGrouped', 'latentAttention'])
