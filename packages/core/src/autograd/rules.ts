/** @file The gradient of every primitive: one table, which does not compile if a rule is missing. */
import { full } from '../create.ts'
import { MoeError } from '../errors.ts'
import type { OpAttrs, PrimitiveName } from '../ops.ts'
import { scatterAddRows, where } from '../primitives.ts'
import { type Shape, sameShape, sizeOf } from '../shape.ts'
import type { Vjp } from '../tape.ts'
import { run, type Tensor } from '../tensor.ts'

/** Sums a gradient over the axes along which its input was broadcast. */
export function unbroadcast(gradient: Tensor, shape: Shape): Tensor {
  if (sameShape(gradient.shape, shape)) return gradient
  const lead = gradient.rank - shape.length
  const axes: number[] = []
  for (let i = 0; i < gradient.rank; i++) {
    if (i < lead || (shape[i - lead] === 1 && gradient.shape[i] !== 1)) axes.push(i)
  }
  return (axes.length > 0 ? gradient.sum(axes, true) : gradient).reshape(shape)
}

const zero = (like: Tensor) => full([], 0, { backend: like.backend })

export const rules: { readonly [P in PrimitiveName]: Vjp<Tensor, OpAttrs[P]> } = {
  unary({ inputs: [x], outputs: [y], attrs: { code } }, [dy]) {
    if (dy === null) return [null]
    switch (code) {
      case 'neg':
        return [dy.neg()]
      case 'abs':
        return [dy.mul(x.sign())]
      case 'sign':
      case 'floor':
        return [null]
      case 'exp':
        return [dy.mul(y)]
      case 'log':
        return [dy.div(x)]
      case 'sqrt':
        return [dy.div(y).mul(0.5)]
      case 'rsqrt':
        return [dy.mul(y.mul(y).mul(y)).mul(-0.5)]
      case 'sin':
        return [dy.mul(x.cos())]
      case 'cos':
        return [dy.mul(x.sin()).neg()]
      case 'tanh':
        return [dy.mul(y.mul(y).neg().add(1))]
      case 'sigmoid':
        return [dy.mul(y.mul(y.neg().add(1)))]
    }
  },

  binary({ inputs: [a, b], outputs: [y], attrs: { code }, needs }, [dy]) {
    if (dy === null) return [null, null]
    const forA = (gradient: () => Tensor) => (needs(0) ? unbroadcast(gradient(), a.shape) : null)
    const forB = (gradient: () => Tensor) => (needs(1) ? unbroadcast(gradient(), b.shape) : null)
    switch (code) {
      case 'add':
        return [forA(() => dy), forB(() => dy)]
      case 'sub':
        return [forA(() => dy), forB(() => dy.neg())]
      case 'mul':
        return [forA(() => dy.mul(b)), forB(() => dy.mul(a))]
      case 'div':
        return [forA(() => dy.div(b)), forB(() => dy.mul(y).div(b).neg())]
      case 'pow':
        return [
          // b a^(b - 1), but 0 where b is 0: there y is 1, also for a = 0.
          forA(() => where(b.eq(0), zero(b), dy.mul(b).mul(a.pow(b.sub(1))))),
          // a^b ln a, but 0 where a is not positive: there the derivative does not exist, or y is 0.
          forB(() => where(a.le(0), zero(a), dy.mul(y).mul(a.maximum(1e-37).log()))),
        ]
      case 'max':
      case 'min': {
        // Equal values share the gradient, so that max(x, x) has slope 1.
        const aWins = code === 'max' ? b.lt(a) : a.lt(b)
        const tie = a.eq(b)
        const share = where(aWins, full([], 1, a), where(tie, full([], 0.5, a), zero(a)))
        return [forA(() => dy.mul(share)), forB(() => dy.mul(share.neg().add(1)))]
      }
    }
  },

  compare: () => [null, null],

  where({ inputs: [condition, a, b], needs }, [dy]) {
    if (dy === null) return [null, null, null]
    return [
      null,
      needs(1) ? unbroadcast(where(condition, dy, zero(dy)), a.shape) : null,
      needs(2) ? unbroadcast(where(condition, zero(dy), dy), b.shape) : null,
    ]
  },

  cast({ inputs: [x] }, [dy]) {
    return [dy === null || x.dtype === 'i32' || x.dtype === 'u8' ? null : dy.cast('f32')]
  },

  fill: () => [],

  reduce({ inputs: [x], outputs: [y], attrs: { code, axes } }, [dy]) {
    if (dy === null) return [null]
    if (code === 'sum') return [dy.expand(x.shape)]
    // Equal maxima share the gradient equally.
    const hit = x.eq(y).cast('f32')
    return [hit.mul(dy.div(hit.sum(axes, true)))]
  },

  cumsum({ attrs: { axis } }, [dy]) {
    if (dy === null) return [null]
    // Running sum from the end: total - inclusive sum + own value.
    return [dy.sum(axis, true).sub(dy.cumsum(axis)).add(dy)]
  },

  topk({ inputs: [x], outputs: [, indices] }, [dValues]) {
    if (dValues === null) return [null]
    const size = x.shape[x.rank - 1]
    const rows = size === 0 ? 0 : sizeOf(x.shape) / size
    const k = indices.shape[indices.rank - 1]
    const base = run('cumsum', [full([rows, 1], size, { dtype: 'i32', backend: x.backend })], { axis: 0 }).sub(size)
    const flat = indices.reshape([rows, k]).add(base)
    return [scatterAddRows(flat, dValues.reshape([rows, k]), rows * size).reshape(x.shape)]
  },

  matmul({ inputs: [a, b], attrs: { transposeA, transposeB, precision }, needs }, [dy]) {
    if (dy === null) return [null, null]
    const product = (x: Tensor, y: Tensor, transposeX: boolean, transposeY: boolean) =>
      run('matmul', [x, y], { transposeA: transposeX, transposeB: transposeY, precision })
    const forA = () => (transposeA ? product(b, dy, transposeB, true) : product(dy, b, false, !transposeB))
    const forB = () => (transposeB ? product(dy, a, true, transposeA) : product(a, dy, !transposeA, false))
    return [needs(0) ? forA() : null, needs(1) ? forB() : null]
  },

  takeRows({ inputs: [x, index] }, [dy]) {
    return [dy === null ? null : scatterAddRows(index, dy, x.shape[0]), null]
  },

  scatterAddRows({ inputs: [index] }, [dy]) {
    return [null, dy === null ? null : dy.takeRows(index)]
  },

  setRows({ inputs: [, index, source], needs }, [dy]) {
    if (dy === null) return [null, null, null]
    if (needs(2)) {
      throw new MoeError({
        code: 'E_NO_GRADIENT',
        op: 'setRows',
        problem: 'the source rows get no gradient, because equal indices would make it ambiguous',
        fix: 'detach() the source, or build the tensor with concat or scatterAddRows',
      })
    }
    const kept = full([index.shape[0], ...source.shape.slice(1)], 0, dy)
    return [needs(0) ? run('setRows', [dy, index, kept], { donate: false }) : null, null, null]
  },

  reshape({ inputs: [x] }, [dy]) {
    return [dy === null ? null : dy.reshape(x.shape)]
  },

  permute({ attrs: { axes } }, [dy]) {
    if (dy === null) return [null]
    const inverse = new Array<number>(axes.length)
    for (let i = 0; i < axes.length; i++) inverse[axes[i]] = i
    return [dy.permute(inverse)]
  },

  expand({ inputs: [x] }, [dy]) {
    return [dy === null ? null : unbroadcast(dy, x.shape)]
  },

  slice({ inputs: [x], outputs: [y], attrs: { starts } }, [dy]) {
    if (dy === null) return [null]
    return [
      dy.pad(
        starts,
        x.shape.map((size, i) => size - starts[i] - y.shape[i]),
      ),
    ]
  },

  pad({ inputs: [x], attrs: { before } }, [dy]) {
    return [dy === null ? null : dy.slice(before, x.shape)]
  },

  concat({ inputs, attrs: { axis }, needs }, [dy]) {
    let start = 0
    return inputs.map((part, i) => {
      const from = start
      start += part.shape[axis]
      return dy !== null && needs(i) ? dy.narrow(axis, from, start) : null
    })
  },
}
