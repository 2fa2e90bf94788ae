/**
 * @file Every primitive as the simplest possible loop over f64: the definition that other backends are tested against.
 */
import type { TensorSpec, Value } from '../backend.ts'
import { fromBf16, fromF8e4m3, fromF16, toBf16, toF8e4m3, toF16 } from '../dtype.ts'
import type { BinaryCode, PrimitiveAttrs, PrimitiveName, UnaryCode } from '../ops.ts'
import { type Shape, sameShape, sizeOf, stridesOf } from '../shape.ts'
import { roundOperand } from './fp8.ts'
import { allocate, broadcastStrides, type Numbers, positions, type ReferenceHandle } from './storage.ts'

export type ReferenceKernels = {
  readonly [P in PrimitiveName]: (
    inputs: readonly Value[],
    attrs: PrimitiveAttrs[P],
    outputs: readonly TensorSpec[],
  ) => Numbers[]
}

const dataOf = (value: Value): Numbers => (value.handle as ReferenceHandle).storage.data

/** Returns the elements of a box of `shape` under the given strides. */
function gather(value: Value, shape: Shape, strides: readonly number[], start = 0): Numbers {
  const out = allocate(value.dtype, sizeOf(shape))
  const data = dataOf(value)
  const last = shape.length - 1
  const [size, stride] = last < 0 ? [1, 0] : [shape[last], strides[last]]
  const rows = positions(shape.slice(0, -1), strides, start)
  for (let row = 0; row < rows.length; row++) {
    const [from, to] = [rows[row], row * size]
    for (let i = 0; i < size; i++) out[to + i] = data[from + i * stride]
  }
  return out
}

/** Returns the elements of a tensor, broadcast to `shape`. */
function broadcast(value: Value, shape: Shape): Numbers {
  if (sameShape(value.shape, shape)) return dataOf(value)
  if (value.shape.length === 0) return allocate(value.dtype, sizeOf(shape)).fill(dataOf(value)[0])
  return gather(value, shape, broadcastStrides(value.shape, shape))
}

const unary: { readonly [C in UnaryCode]: (x: number) => number } = {
  neg: x => -x,
  abs: Math.abs,
  sign: x => (x > 0 ? 1 : x < 0 ? -1 : Number.isNaN(x) ? x : 0),
  exp: Math.exp,
  log: Math.log,
  sqrt: Math.sqrt,
  rsqrt: x => 1 / Math.sqrt(x),
  sin: Math.sin,
  cos: Math.cos,
  tanh: Math.tanh,
  sigmoid: x => 1 / (1 + Math.exp(-x)),
  floor: Math.floor,
}

/** Computes each element of `out` from those of `x` and `y`. A call for each element would take longer than the arithmetic. */
type BinaryLoop = (out: Numbers, x: Numbers, y: Numbers) => void

const binary: { readonly [C in BinaryCode]: BinaryLoop } = {
  add(out, x, y) {
    for (let i = 0; i < out.length; i++) out[i] = x[i] + y[i]
  },
  sub(out, x, y) {
    for (let i = 0; i < out.length; i++) out[i] = x[i] - y[i]
  },
  mul(out, x, y) {
    for (let i = 0; i < out.length; i++) out[i] = x[i] * y[i]
  },
  div(out, x, y) {
    for (let i = 0; i < out.length; i++) out[i] = x[i] / y[i]
  },
  max(out, x, y) {
    for (let i = 0; i < out.length; i++) out[i] = Math.max(x[i], y[i])
  },
  min(out, x, y) {
    for (let i = 0; i < out.length; i++) out[i] = Math.min(x[i], y[i])
  },
  pow(out, x, y) {
    for (let i = 0; i < out.length; i++) out[i] = x[i] ** y[i]
  },
}

const integerBinary: { readonly [C in BinaryCode]: BinaryLoop } = {
  ...binary,
  mul(out, x, y) {
    for (let i = 0; i < out.length; i++) out[i] = Math.imul(x[i], y[i])
  },
  div(out, x, y) {
    for (let i = 0; i < out.length; i++) out[i] = y[i] === 0 ? 0 : Math.trunc(x[i] / y[i])
  },
}

const compare = {
  eq: (a: number, b: number) => a === b,
  lt: (a: number, b: number) => a < b,
  le: (a: number, b: number) => a <= b,
}

/** Returns the sizes [outer, size, inner] before, of and after an axis. */
function around(shape: Shape, axis: number): [number, number, number] {
  return [sizeOf(shape.slice(0, axis)), shape[axis], sizeOf(shape.slice(axis + 1))]
}

/** Returns the position of an index for each axis. */
const offsetOf = (indices: readonly number[], strides: readonly number[]) =>
  indices.reduce((sum, at, axis) => sum + at * strides[axis], 0)

const rowSize = (shape: Shape, rowAxes: number) => sizeOf(shape.slice(rowAxes))

export const referencePrimitives: ReferenceKernels = {
  unary([x], { code }, [spec]) {
    const out = allocate(spec.dtype, sizeOf(spec.shape))
    const data = dataOf(x)
    const fn = unary[code]
    for (let i = 0; i < out.length; i++) out[i] = fn(data[i])
    return [out]
  },

  binary([a, b], { code }, [spec]) {
    const out = allocate(spec.dtype, sizeOf(spec.shape))
    const fn = spec.dtype === 'i32' ? integerBinary[code] : binary[code]
    fn(out, broadcast(a, spec.shape), broadcast(b, spec.shape))
    return [out]
  },

  compare([a, b], { code }, [spec]) {
    const out = allocate('u8', sizeOf(spec.shape))
    const fn = compare[code]
    const [x, y] = [broadcast(a, spec.shape), broadcast(b, spec.shape)]
    for (let i = 0; i < out.length; i++) out[i] = fn(x[i], y[i]) ? 1 : 0
    return [out]
  },

  where([condition, a, b], _, [spec]) {
    const out = allocate(spec.dtype, sizeOf(spec.shape))
    const [c, x, y] = [condition, a, b].map(value => broadcast(value, spec.shape))
    for (let i = 0; i < out.length; i++) out[i] = c[i] !== 0 ? x[i] : y[i]
    return [out]
  },

  cast([x], { dtype }, [spec]) {
    const out = allocate(dtype, sizeOf(spec.shape))
    const data = dataOf(x)
    for (let i = 0; i < out.length; i++) out[i] = convert[dtype](data[i])
    return [out]
  },

  fill(_, { value }, [spec]) {
    return [allocate(spec.dtype, sizeOf(spec.shape)).fill(convert[spec.dtype](value))]
  },

  reduce([x], { code, axes }, [spec]) {
    const out = allocate(spec.dtype, sizeOf(spec.shape))
    const least = spec.dtype === 'i32' ? -(2 ** 31) : Number.NEGATIVE_INFINITY
    if (code === 'max') out.fill(least)
    const strides = stridesOf(spec.shape)
    for (const axis of axes) strides[axis] = 0
    const data = dataOf(x)
    const at = positions(x.shape, strides)
    if (code === 'sum') for (let i = 0; i < at.length; i++) out[at[i]] += data[i]
    else for (let i = 0; i < at.length; i++) out[at[i]] = Math.max(out[at[i]], data[i])
    return [out]
  },

  cumsum([x], { axis }) {
    const out = dataOf(x).slice()
    const [outer, size, inner] = around(x.shape, axis)
    for (let o = 0; o < outer; o++) {
      for (let i = 1; i < size; i++) {
        for (let j = 0; j < inner; j++) out[(o * size + i) * inner + j] += out[(o * size + i - 1) * inner + j]
      }
    }
    return [out]
  },

  topk([x], { k }, [spec]) {
    const size = x.shape[x.shape.length - 1]
    const rows = sizeOf(x.shape) / size
    const values = allocate('f32', sizeOf(spec.shape))
    const indices = allocate('i32', sizeOf(spec.shape))
    const data = dataOf(x)
    for (let row = 0; row < rows; row++) {
      const key = (i: number) => {
        const value = data[row * size + i]
        return Number.isNaN(value) ? Number.NEGATIVE_INFINITY : value
      }
      const best = Array.from({ length: size }, (_, i) => i).sort((a, b) =>
        key(a) === key(b) ? a - b : key(b) - key(a),
      )
      for (let i = 0; i < k; i++) {
        values[row * k + i] = data[row * size + best[i]]
        indices[row * k + i] = best[i]
      }
    }
    return [values, indices]
  },

  matmul([a, b], { transposeA, transposeB, precision }, [spec]) {
    const rank = spec.shape.length
    const [m, n] = spec.shape.slice(-2)
    const batch = rank === 3 ? spec.shape[0] : 1
    const k = a.shape[rank - (transposeA ? 2 : 1)]
    const out = allocate('f32', batch * m * n)
    const [stepI, stepP] = transposeA ? [1, m] : [k, 1]
    const [stepQ, stepJ] = transposeB ? [1, k] : [n, 1]
    const operand = (value: Value, outer: number, stepOuter: number, stepK: number) =>
      precision === 'fp8' && rank === 2
        ? roundOperand(dataOf(value) as Float64Array, { outer, k, stepOuter, stepK })
        : dataOf(value)
    const [x, y] = [operand(a, m, stepI, stepP), operand(b, n, stepJ, stepQ)]
    for (let row = 0; row < batch * m; row++) {
      const s = Math.floor(row / m)
      const left = s * m * k + (row % m) * stepI
      const right = s * k * n
      // Four sums at a time, because each addition waits for the previous one of its sum. The last four may be repeated.
      for (let j = 0; j < n; j += 4) {
        const [j1, j2, j3] = [Math.min(j + 1, n - 1), Math.min(j + 2, n - 1), Math.min(j + 3, n - 1)]
        let [sum0, sum1, sum2, sum3] = [0, 0, 0, 0]
        for (let p = 0; p < k; p++) {
          const factor = x[left + p * stepP]
          const from = right + p * stepQ
          sum0 += factor * y[from + j * stepJ]
          sum1 += factor * y[from + j1 * stepJ]
          sum2 += factor * y[from + j2 * stepJ]
          sum3 += factor * y[from + j3 * stepJ]
        }
        out[row * n + j] = sum0
        out[row * n + j1] = sum1
        out[row * n + j2] = sum2
        out[row * n + j3] = sum3
      }
    }
    return [out]
  },

  takeRows([x, index], _, [spec]) {
    const out = allocate(spec.dtype, sizeOf(spec.shape))
    const size = rowSize(x.shape, 1)
    const [data, rows] = [dataOf(x), dataOf(index)]
    for (let i = 0; i < rows.length; i++) {
      if (rows[i] < 0 || rows[i] >= x.shape[0]) continue
      for (let j = 0; j < size; j++) out[i * size + j] = data[rows[i] * size + j]
    }
    return [out]
  },

  scatterAddRows([index, source], { rows: total }, [spec]) {
    const out = allocate(spec.dtype, sizeOf(spec.shape))
    const size = rowSize(spec.shape, 1)
    const [rows, data] = [dataOf(index), dataOf(source)]
    for (let i = 0; i < rows.length; i++) {
      if (rows[i] < 0 || rows[i] >= total) continue
      for (let j = 0; j < size; j++) out[rows[i] * size + j] += data[i * size + j]
    }
    return [out]
  },

  setRows([x, index, source]) {
    const out = dataOf(x).slice()
    const size = rowSize(x.shape, 1)
    const [rows, data] = [dataOf(index), dataOf(source)]
    for (let i = 0; i < rows.length; i++) {
      if (rows[i] < 0 || rows[i] >= x.shape[0]) continue
      for (let j = 0; j < size; j++) out[rows[i] * size + j] = data[i * size + j]
    }
    return [out]
  },

  reshape([x]) {
    return [dataOf(x)]
  },

  permute([x], { axes }, [spec]) {
    const strides = stridesOf(x.shape)
    const permuted = axes.map(axis => strides[axis])
    return [gather(x, spec.shape, permuted)]
  },

  expand([x], _, [spec]) {
    return [gather(x, spec.shape, broadcastStrides(x.shape, spec.shape))]
  },

  slice([x], { starts }, [spec]) {
    const strides = stridesOf(x.shape)
    return [gather(x, spec.shape, strides, offsetOf(starts, strides))]
  },

  pad([x], { before, value }, [spec]) {
    const out = allocate(spec.dtype, sizeOf(spec.shape)).fill(value)
    const strides = stridesOf(spec.shape)
    const data = dataOf(x)
    const at = positions(x.shape, strides, offsetOf(before, strides))
    for (let i = 0; i < at.length; i++) out[at[i]] = data[i]
    return [out]
  },

  concat(parts, { axis }, [spec]) {
    const out = allocate(spec.dtype, sizeOf(spec.shape))
    const [outer, total, inner] = around(spec.shape, axis)
    let done = 0
    for (const part of parts) {
      const data = dataOf(part)
      const size = part.shape[axis] * inner
      for (let o = 0; o < outer; o++)
        out.set(data.subarray(o * size, (o + 1) * size) as never, o * total * inner + done)
      done += size
    }
    return [out]
  },
}

const toInteger = (low: number, high: number) => (x: number) =>
  Number.isNaN(x) ? 0 : Math.min(high, Math.max(low, Math.trunc(x)))

const convert = {
  f32: (x: number) => x,
  bf16: (x: number) => fromBf16(toBf16(x)),
  f16: (x: number) => fromF16(toF16(x)),
  f8e4m3: (x: number) => fromF8e4m3(toF8e4m3(x)),
  i32: toInteger(-(2 ** 31), 2 ** 31 - 1),
  u8: toInteger(0, 255),
}
