/** @file Compares primitives on random shapes with the reference backend, and checks that 1 and 2 threads give the same bits on sizes that are split. */
import {
  type DType,
  full,
  hostArray,
  type PrimitiveAttrs,
  type PrimitiveName,
  Random,
  type Shape,
  scope,
  type TensorSpec,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, type Tolerance, tolerances } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { createBackend } from './index.ts'
import { availableIsas, type HostInput, runOp, testBackend } from './test-backend.ts'

interface Call<P extends PrimitiveName = PrimitiveName> {
  readonly op: P
  readonly inputs: readonly HostInput[]
  readonly attrs: PrimitiveAttrs[P]
  readonly outputs: readonly TensorSpec[]
  readonly tolerance?: Tolerance
}

const sizeOf = (shape: Shape) => shape.reduce((a, b) => a * b, 1)
const pick = <T>(random: Random, values: readonly T[]): T => values[random.integer(values.length)]

/** Mostly small sizes, including ones and zeros, and sometimes sizes beyond a vector or a tile. */
const someSize = (random: Random) => pick(random, [0, 1, 1, 2, 3, 4, 5, 7, 9, 16, 17, 33, 70])
const someShape = (random: Random, rank: number, most = 40_000): number[] => {
  const shape = Array.from({ length: rank }, () => someSize(random))
  while (sizeOf(shape) > most) shape[random.integer(rank)] = 2
  return shape
}

function input(random: Random, shape: Shape, dtype: DType = 'f32'): HostInput {
  const size = sizeOf(shape)
  const data =
    dtype === 'f32' ? random.normal(size) : Float64Array.from({ length: size }, () => random.integer(200) - 100)
  return { data: dtype === 'u8' ? data.map(x => (x > 0 ? 1 : 0)) : data, shape, dtype }
}

/** A shape that broadcasts to `out`: leading axes dropped, some axes 1. */
function broadcastable(random: Random, out: Shape): number[] {
  return out.slice(random.integer(out.length + 1)).map(size => (random.integer(3) === 0 ? 1 : size))
}

function shuffled(random: Random, length: number): number[] {
  const order = Array.from({ length }, (_, i) => i)
  for (let i = length - 1; i > 0; i--) {
    const j = random.integer(i + 1)
    ;[order[i], order[j]] = [order[j], order[i]]
  }
  return order
}

const movable: readonly DType[] = ['f32', 'i32', 'u8', 'bf16']

/** A random call of each primitive. */
const calls: { readonly [op: string]: (random: Random) => Call } = {
  binary(random) {
    const out = someShape(random, random.integer(5))
    const dtype = pick(random, ['f32', 'i32'] as const)
    const inputs = [input(random, broadcastable(random, out), dtype), input(random, broadcastable(random, out), dtype)]
    const code = pick(random, ['add', 'sub', 'mul', 'max', 'min', 'div'] as const)
    return { op: 'binary', inputs, attrs: { code }, outputs: [{ shape: out, dtype }] }
  },
  compare(random) {
    const out = someShape(random, random.integer(4))
    const dtype = pick(random, ['f32', 'i32'] as const)
    const inputs = [input(random, broadcastable(random, out), dtype), input(random, broadcastable(random, out), dtype)]
    return {
      op: 'compare',
      inputs,
      attrs: { code: pick(random, ['eq', 'lt', 'le'] as const) },
      outputs: [{ shape: out, dtype: 'u8' }],
    }
  },
  where(random) {
    const out = someShape(random, random.integer(4))
    const dtype = pick(random, ['f32', 'i32'] as const)
    const inputs = [
      input(random, broadcastable(random, out), 'u8'),
      input(random, broadcastable(random, out), dtype),
      input(random, broadcastable(random, out), dtype),
    ]
    return { op: 'where', inputs, attrs: {}, outputs: [{ shape: out, dtype }] }
  },
  reduce(random) {
    const shape = someShape(random, 1 + random.integer(4))
    const axes = shape.map((_, i) => i).filter(() => random.integer(2) === 0)
    if (axes.length === 0) axes.push(random.integer(shape.length))
    const dtype = pick(random, ['f32', 'i32'] as const)
    const out = shape.map((size, i) => (axes.includes(i) ? 1 : size))
    const attrs = { code: pick(random, ['sum', 'max'] as const), axes }
    return {
      op: 'reduce',
      inputs: [input(random, shape, dtype)],
      attrs,
      outputs: [{ shape: out, dtype }],
      tolerance: tolerances.sum,
    }
  },
  cumsum(random) {
    const shape = someShape(random, 1 + random.integer(3))
    const dtype = pick(random, ['f32', 'i32'] as const)
    const attrs = { axis: random.integer(shape.length) }
    return {
      op: 'cumsum',
      inputs: [input(random, shape, dtype)],
      attrs,
      outputs: [{ shape, dtype }],
      tolerance: tolerances.sum,
    }
  },
  topk(random) {
    const n = pick(random, [1, 5, 31, 64, 200, 1500])
    const k = 1 + random.integer(pick(random, [n, Math.min(n, 100)]))
    const rows = random.integer(5)
    const x = input(random, [rows, n])
    // Few distinct values, so that ties are common.
    const data = Float32Array.from(x.data, v => (random.integer(20) === 0 ? Number.NaN : Math.round(v * 4)))
    const shape = [rows, k]
    return {
      op: 'topk',
      inputs: [{ data, shape: [rows, n] }],
      attrs: { k },
      outputs: [
        { shape, dtype: 'f32' },
        { shape, dtype: 'i32' },
      ],
    }
  },
  permute(random) {
    const shape = someShape(random, 1 + random.integer(5))
    const axes = shuffled(random, shape.length)
    const dtype = pick(random, movable)
    return {
      op: 'permute',
      inputs: [input(random, shape, dtype)],
      attrs: { axes },
      outputs: [{ shape: axes.map(a => shape[a]), dtype }],
    }
  },
  expand(random) {
    const out = someShape(random, 1 + random.integer(4))
    const dtype = pick(random, movable)
    const shape = out.map(size => (random.integer(2) === 0 ? 1 : size))
    return { op: 'expand', inputs: [input(random, shape, dtype)], attrs: {}, outputs: [{ shape: out, dtype }] }
  },
  slice(random) {
    const shape = someShape(random, 1 + random.integer(4))
    const starts = shape.map(size => random.integer(size + 1))
    const out = shape.map((size, i) => random.integer(size - starts[i] + 1))
    const dtype = pick(random, movable)
    return { op: 'slice', inputs: [input(random, shape, dtype)], attrs: { starts }, outputs: [{ shape: out, dtype }] }
  },
  pad(random) {
    const shape = someShape(random, 1 + random.integer(3), 4000)
    const before = shape.map(() => random.integer(4))
    const out = shape.map((size, i) => size + before[i] + random.integer(4))
    const dtype = pick(random, ['f32', 'i32'] as const)
    return {
      op: 'pad',
      inputs: [input(random, shape, dtype)],
      attrs: { before, value: -3 },
      outputs: [{ shape: out, dtype }],
    }
  },
  concat(random) {
    const shape = someShape(random, 1 + random.integer(4), 8000)
    const axis = random.integer(shape.length)
    const dtype = pick(random, movable)
    const sizes = Array.from({ length: 1 + random.integer(4) }, () => someSize(random))
    const inputs = sizes.map(size => input(random, shape.with(axis, size), dtype))
    const total = sizes.reduce((a, b) => a + b, 0)
    return { op: 'concat', inputs, attrs: { axis }, outputs: [{ shape: shape.with(axis, total), dtype }] }
  },
  takeRows(random) {
    const shape = someShape(random, 1 + random.integer(3))
    const any = someShape(random, random.integer(3), 300)
    const dtype = pick(random, movable)
    const index = {
      data: Int32Array.from({ length: sizeOf(any) }, () => random.integer(shape[0] + 2) - 1),
      shape: any,
      dtype: 'i32' as const,
    }
    return {
      op: 'takeRows',
      inputs: [input(random, shape, dtype), index],
      attrs: {},
      outputs: [{ shape: [...any, ...shape.slice(1)], dtype }],
    }
  },
  scatterAddRows(random) {
    const rest = someShape(random, random.integer(3), 500)
    const n = pick(random, [0, 1, 9, 150])
    const rows = pick(random, [1, 4, 300])
    const dtype = pick(random, ['f32', 'i32'] as const)
    const index = {
      data: Int32Array.from({ length: n }, () => random.integer(rows + 2) - 1),
      shape: [n],
      dtype: 'i32' as const,
    }
    const out = [rows, ...rest]
    const inputs = [index, input(random, [n, ...rest], dtype)]
    return {
      op: 'scatterAddRows',
      inputs,
      attrs: { rows },
      outputs: [{ shape: out, dtype }],
      tolerance: tolerances.sum,
    }
  },
  setRows(random) {
    const shape = someShape(random, 1 + random.integer(3))
    const n = pick(random, [0, 1, 9, 40])
    const dtype = pick(random, ['f32', 'i32'] as const)
    const index = {
      data: Int32Array.from({ length: n }, () => random.integer(shape[0] + 2) - 1),
      shape: [n],
      dtype: 'i32' as const,
    }
    const inputs = [input(random, shape, dtype), index, input(random, [n, ...shape.slice(1)], dtype)]
    return { op: 'setRows', inputs, attrs: { donate: false }, outputs: [{ shape, dtype }] }
  },
  fill(random) {
    const shape = someShape(random, random.integer(4))
    return {
      op: 'fill',
      inputs: [],
      attrs: { value: -2 },
      outputs: [{ shape, dtype: pick(random, ['f32', 'i32'] as const) }],
    }
  },
  cast(random) {
    const shape = [random.integer(2000)]
    const dtypes: readonly DType[] = ['f32', 'bf16', 'f16', 'f8e4m3', 'i32', 'u8']
    const [from, to] = [pick(random, dtypes), pick(random, dtypes)]
    const scale = pick(random, [1e-9, 1e-4, 0.02, 1, 400, 1e5, 1e12])
    const data = Float32Array.from(random.normal(shape[0]), x =>
      from === 'i32' || from === 'u8' ? Math.round(x * 300) : x * scale,
    )
    return {
      op: 'cast',
      inputs: [{ data, shape, dtype: from }],
      attrs: { dtype: to },
      outputs: [{ shape, dtype: to }],
      tolerance: tolerances.exact,
    }
  },
}

describe.each(await availableIsas())('%s', isa => {
  test.each(Object.keys(calls))('%s matches the reference for random shapes', async name => {
    const [cpu, reference] = [await testBackend({ isa, threads: 2 }), referenceBackend()]
    const random = new Random(17).fork(name)
    for (let i = 0; i < 150; i++) {
      const { op, inputs, attrs, outputs, tolerance } = calls[name](random)
      const label = `${op} ${JSON.stringify(attrs)} of ${inputs.map(x => `${x.dtype}[${x.shape}]`).join(' ')}`
      const actual = await runOp(cpu, op, inputs, attrs as never, outputs)
      const expected = await runOp(reference, op, inputs, attrs as never, outputs)
      for (let k = 0; k < outputs.length; k++) assertClose(label, actual[k], expected[k], tolerance)
    }
    expect(cpu.stats().handles).toBe(0)
    cpu.dispose()
  })

  test.each([
    [[2 ** 22], 0],
    [[2 ** 22, 2], 0],
    [[4, 2 ** 20, 2], 1],
  ])('the error of sums does not grow with the number of terms: %j', async (shape, axis) => {
    const cpu = await createBackend({ isa, threads: 2 })
    const sums = scope(() => full(shape, 0.1, { backend: cpu }).sum(axis))
    const expected = Math.fround(0.1) * shape[axis]
    for (const sum of await sums.values()) expect(Math.abs(sum / expected - 1)).toBeLessThan(5e-6)
    cpu.dispose()
  })
})

/** Sizes that every kernel splits into pieces. */
const large: readonly Call[] = (() => {
  const random = new Random(23)
  const wide = input(random, [700, 301])
  const index = {
    data: Int32Array.from({ length: 900 }, () => random.integer(700)),
    shape: [900],
    dtype: 'i32' as const,
  }
  const f32 = (...shape: number[]): TensorSpec => ({ shape, dtype: 'f32' })
  return [
    { op: 'binary', inputs: [wide, input(random, [301])], attrs: { code: 'div' }, outputs: [f32(700, 301)] },
    { op: 'binary', inputs: [wide, input(random, [700, 1])], attrs: { code: 'pow' }, outputs: [f32(700, 301)] },
    { op: 'unary', inputs: [wide], attrs: { code: 'tanh' }, outputs: [f32(700, 301)] },
    ...[[0], [1], [0, 1]].map(axes => ({
      op: 'reduce' as const,
      inputs: [wide],
      attrs: { code: 'sum' as const, axes },
      outputs: [f32(axes.includes(0) ? 1 : 700, axes.includes(1) ? 1 : 301)],
    })),
    { op: 'reduce', inputs: [input(random, [9001, 5])], attrs: { code: 'sum', axes: [0] }, outputs: [f32(1, 5)] },
    { op: 'reduce', inputs: [input(random, [400_003])], attrs: { code: 'sum', axes: [0] }, outputs: [f32(1)] },
    { op: 'cumsum', inputs: [wide], attrs: { axis: 0 }, outputs: [f32(700, 301)] },
    { op: 'permute', inputs: [wide], attrs: { axes: [1, 0] }, outputs: [f32(301, 700)] },
    { op: 'takeRows', inputs: [wide, index], attrs: {}, outputs: [f32(900, 301)] },
    {
      op: 'scatterAddRows',
      inputs: [index, input(random, [900, 301])],
      attrs: { rows: 700 },
      outputs: [f32(700, 301)],
    },
    { op: 'scatterAddRows', inputs: [index, input(random, [900, 40])], attrs: { rows: 700 }, outputs: [f32(700, 40)] },
    { op: 'topk', inputs: [wide], attrs: { k: 6 }, outputs: [f32(700, 6), { shape: [700, 6], dtype: 'i32' }] },
    { op: 'concat', inputs: [wide, wide], attrs: { axis: 1 }, outputs: [f32(700, 602)] },
  ] as Call[]
})()

test.each(large.map(call => [`${call.op} ${JSON.stringify(call.attrs)} of [${call.inputs[0].shape}]`, call] as const))(
  '%s: results are bitwise equal with 1, 2 and 5 threads and match the reference',
  async (_, { op, inputs, attrs, outputs }) => {
    const results = []
    for (const threads of [1, 2, 5, 2]) {
      const backend = await testBackend({ threads })
      results.push(await runOp(backend, op, inputs, attrs as never, outputs))
      backend.dispose()
    }
    for (const result of results.slice(1)) expect(result).toEqual(results[0])
    const expected = await runOp(referenceBackend(), op, inputs, attrs as never, outputs)
    for (let k = 0; k < expected.length; k++)
      assertClose(op, results[0][k], expected[k], { relative: 1e-5, absolute: 1e-3 })
    expect(results[0][0]).not.toEqual(hostArray(outputs[0].dtype, results[0][0].length))
  },
)
