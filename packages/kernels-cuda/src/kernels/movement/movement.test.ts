import {
  bitsOf,
  type DType,
  type HostArray,
  hostArray,
  type PrimitiveAttrs,
  type Shape,
  sizeOf,
  stridesOf,
} from '@moe/core'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'
import { borders } from './movement.ts'
import { unitOf } from './units.ts'

test('the unit divides all sizes and strides', () => {
  expect(unitOf(64, 48)).toBe(16)
  expect(unitOf(64, 48, 4)).toBe(4)
  expect(unitOf(3)).toBe(1)
  expect(unitOf(0)).toBe(16)
})

test('axes without padding are merged', () => {
  expect(borders([2, 3, 4], [0, 1, 0], [2, 5, 4])).toEqual([
    [20, 12, 4, 1],
    [2, 2, 0, 12],
  ])
  expect(borders([], [], [])).toEqual([[1, 1, 0, 1]])
})

/** Returns data whose element i is i mod 251 (for bf16, its bits). */
function counting(dtype: DType, shape: Shape): HostArray {
  const data = hostArray(dtype, sizeOf(shape))
  for (let i = 0; i < data.length; i++) data[i] = i % 251
  return data
}

/** Computes y[index] = x[place(index)] if that is inside of x, otherwise `value`. */
function moved(
  x: HostArray,
  from: Shape,
  dtype: DType,
  to: Shape,
  place: (index: number[]) => number[],
  value = 0,
): HostArray {
  const y = hostArray(dtype, sizeOf(to)).fill(value)
  const [steps, strides] = [stridesOf(to), stridesOf(from)]
  for (let i = 0; i < y.length; i++) {
    const at = place(to.map((size, axis) => Math.floor(i / steps[axis]) % size))
    if (at.every((k, axis) => k >= 0 && k < from[axis]))
      y[i] = x[at.reduce((sum, k, axis) => sum + k * strides[axis], 0)]
  }
  return y
}

const dtypes: readonly DType[] = ['u8', 'bf16', 'f32']

describe.skipIf(unavailable)('on the device', () => {
  type Movement = 'permute' | 'expand' | 'slice' | 'pad' | 'concat'
  async function run<O extends Movement>(
    op: O,
    x: HostArray,
    shape: Shape,
    dtype: DType,
    attrs: PrimitiveAttrs[O],
    to: Shape,
  ) {
    const backend = await testBackend()
    const value = { handle: backend.upload(x, shape, dtype), shape, dtype }
    const spec = { shape: to, dtype }
    const [handle] = (backend.primitives[op] as (...args: unknown[]) => unknown[])([value], attrs, [spec])
    const y = await backend.download({ handle, ...spec })
    backend.dispose()
    return y
  }

  // Partial tiles, many small transposes, narrow ones, runs of 16 bytes and less, and permutations that change nothing.
  test.each(
    dtypes.flatMap(dtype =>
      [
        { shape: [37, 53], axes: [1, 0] },
        { shape: [3, 40, 2, 33], axes: [2, 3, 0, 1] },
        { shape: [200, 3], axes: [1, 0] },
        { shape: [2, 5, 6, 16], axes: [0, 2, 1, 3] },
        { shape: [2, 5, 6, 3], axes: [0, 2, 1, 3] },
        { shape: [9, 1, 8], axes: [1, 0, 2] },
        { shape: [33, 2, 34, 3], axes: [2, 1, 0, 3] },
      ].map(({ shape, axes }) => ({ dtype, shape, axes })),
    ),
  )('permute $dtype $shape to $axes', async ({ dtype, shape, axes }) => {
    const to = axes.map(axis => shape[axis])
    const x = counting(dtype, shape)
    const expected = moved(x, shape, dtype, to, index => shape.map((_, axis) => index[axes.indexOf(axis)]))
    expect(await run('permute', x, shape, dtype, { axes }, to)).toEqual(expected)
  })

  test.each(
    dtypes.flatMap(dtype =>
      [
        { shape: [7, 32], starts: [2, 16], to: [4, 16] },
        { shape: [7, 32], starts: [2, 3], to: [4, 9] },
        { shape: [4, 6, 8], starts: [1, 2, 0], to: [2, 3, 8] },
        { shape: [50], starts: [3], to: [41] },
      ].map(sizes => ({ dtype, ...sizes })),
    ),
  )('slice $dtype $shape from $starts to $to, and back by padding', async ({ dtype, shape, starts, to }) => {
    const x = counting(dtype, shape)
    const expected = moved(x, shape, dtype, to, index => index.map((k, axis) => k + starts[axis]))
    const y = await run('slice', x, shape, dtype, { starts }, to)
    expect(y).toEqual(expected)
    const value = dtype === 'f32' ? -2.5 : 3
    const bits = dtype === 'bf16' ? bitsOf(value, dtype) : value
    const padded = moved(y, to, dtype, shape, index => index.map((k, axis) => k - starts[axis]), bits)
    expect(await run('pad', y, to, dtype, { before: starts, value }, shape)).toEqual(padded)
  })

  test.each(dtypes)('expand %s', async dtype => {
    const shape = [3, 1, 8]
    const to = [3, 5, 8]
    const x = counting(dtype, shape)
    const expected = moved(x, shape, dtype, to, ([a, , c]) => [a, 0, c])
    expect(await run('expand', x, shape, dtype, {}, to)).toEqual(expected)
  })
})
