import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { unbroadcast } from './autograd/rules.ts'
import { tensor } from './create.ts'
import { isMoeError } from './errors.ts'
import { concat } from './primitives.ts'
import { Random } from './random.ts'
import { readF64, referenceBackend } from './reference/index.ts'
import { broadcastShapes, normalizeAxis, sameShape, showShape, sizeOf, stridesOf } from './shape.ts'

const backend = referenceBackend()
const shapes = fc.array(fc.integer({ min: 0, max: 4 }), { maxLength: 4 })

/** Two shapes that broadcast, derived from one shape: each side has some sizes of 1, and may lack leading axes. */
const broadcastable = fc
  .record({
    whole: shapes,
    ones: fc.tuple(fc.integer({ min: 0, max: 15 }), fc.integer({ min: 0, max: 15 })),
    cut: fc.tuple(fc.nat(4), fc.nat(4)),
  })
  .map(({ whole, ones, cut }) =>
    [0, 1].map(side =>
      whole.map((size, i) => ((ones[side] >> i) & 1 ? 1 : size)).slice(Math.min(cut[side], whole.length)),
    ),
  )

/** Returns a tensor of normally distributed numbers. */
const randomTensor = (shape: readonly number[], seed: number) =>
  tensor(new Random(seed).normal(sizeOf(shape)), shape, { backend })

describe('broadcasting', () => {
  test('combines sizes of 1, missing axes and empty axes', () => {
    expect(broadcastShapes('add', [2, 3], [3])).toEqual([2, 3])
    expect(broadcastShapes('add', [4, 1, 3], [5, 1])).toEqual([4, 5, 3])
    expect(broadcastShapes('add', [], [2, 0])).toEqual([2, 0])
    expect(broadcastShapes('add', [1], [0])).toEqual([0])
  })

  test('the error names both shapes and the two sizes', () => {
    expect(() => broadcastShapes('add', [2, 3], [2])).toThrow(
      /^add: shapes do not broadcast, lhs \[2,3\] rhs \[2\]: 3 != 2; counting axes from the right, make the sizes equal or one of them 1/,
    )
    expect(() => broadcastShapes('add', [2], [0])).toThrow(/2 != 0/)
  })

  test('is symmetric, and takes each size from a side where it is not 1', () => {
    fc.assert(
      fc.property(broadcastable, ([a, b]) => {
        const out = broadcastShapes('add', a, b)
        expect(broadcastShapes('add', b, a)).toEqual(out)
        expect(out.length).toBe(Math.max(a.length, b.length))
        for (const side of [a, b]) {
          expect(broadcastShapes('add', side, out)).toEqual(out)
          side.forEach((size, i) => {
            if (size !== 1) expect(out[out.length - side.length + i]).toBe(size)
          })
        }
      }),
      { seed: 2 },
    )
  })

  test('any two shapes either broadcast or are rejected with E_SHAPE', () => {
    fc.assert(
      fc.property(shapes, shapes, (a, b) => {
        const fits = [...a].reverse().every((size, i) => {
          const other = i < b.length ? b[b.length - 1 - i] : 1
          return size === other || size === 1 || other === 1
        })
        try {
          broadcastShapes('add', a, b)
          return fits
        } catch (error) {
          return !fits && isMoeError(error, 'E_SHAPE')
        }
      }),
      { seed: 3 },
    )
  })

  test('unbroadcast is the adjoint of expand: <expand(x), y> = <x, unbroadcast(y)>', () => {
    fc.assert(
      fc.property(broadcastable, ([a, b]) => {
        const out = broadcastShapes('mul', a, b)
        const x = randomTensor(a, 1)
        const y = randomTensor(out, 2)
        const dot = (p: typeof x, q: typeof x) => readF64(p.mul(q).sum())[0]
        const back = unbroadcast(y, a)
        expect(back.shape).toEqual(a)
        expect(dot(x.expand(out), y)).toBeCloseTo(dot(x, back), 8)
      }),
      { seed: 4 },
    )
  })
})

describe('moving elements', () => {
  test('a permutation and its inverse restore the tensor', () => {
    const permuted = shapes.chain(shape =>
      fc.tuple(
        fc.constant(shape),
        fc.shuffledSubarray(
          shape.map((_, i) => i),
          { minLength: shape.length },
        ),
      ),
    )
    fc.assert(
      fc.property(permuted, ([shape, axes]) => {
        const x = randomTensor(shape, 3)
        const y = x.permute(axes)
        expect(y.shape).toEqual(axes.map(axis => shape[axis]))
        const inverse = axes.map((_, i) => axes.indexOf(i))
        expect(readF64(y.permute(inverse))).toEqual(readF64(x))
      }),
      { seed: 5 },
    )
  })

  test('splitting an axis in two and concatenating the parts restores the tensor', () => {
    const cuts = shapes
      .filter(shape => shape.length > 0)
      .chain(shape =>
        fc.nat(shape.length - 1).chain(axis => fc.tuple(fc.constant(shape), fc.constant(axis), fc.nat(shape[axis]))),
      )
    fc.assert(
      fc.property(cuts, ([shape, axis, at]) => {
        const x = randomTensor(shape, 4)
        const whole = concat([x.narrow(axis, 0, at), x.narrow(axis, at, shape[axis])], axis)
        expect(whole.shape).toEqual(shape)
        expect(readF64(whole)).toEqual(readF64(x))
      }),
      { seed: 6 },
    )
  })

  test('padding and slicing the same box restores the tensor', () => {
    const padded = shapes.chain(shape => {
      const amounts = fc.array(fc.nat(2), { minLength: shape.length, maxLength: shape.length })
      return fc.tuple(fc.constant(shape), amounts, amounts)
    })
    fc.assert(
      fc.property(padded, ([shape, before, after]) => {
        const x = randomTensor(shape, 5)
        const y = x.pad(before, after, 7)
        expect(y.shape).toEqual(shape.map((size, i) => before[i] + size + after[i]))
        expect(readF64(y.slice(before, shape))).toEqual(readF64(x))
        const around = readF64(y.sum())[0] - readF64(x.sum())[0]
        expect(around).toBeCloseTo(7 * (y.size - x.size), 8)
      }),
      { seed: 7 },
    )
  })
})

describe('arithmetic on shapes', () => {
  test('sizes, equality and text', () => {
    expect(sizeOf([])).toBe(1)
    expect(sizeOf([3, 0, 2])).toBe(0)
    expect(showShape([2, 3])).toBe('[2,3]')
    expect(showShape([])).toBe('[]')
    expect(sameShape([2, 3], [2, 3])).toBe(true)
    expect(sameShape([2, 3], [2, 3, 1])).toBe(false)
    expect(sameShape([2, 3], [3, 2])).toBe(false)
  })

  test('strides lead to the position in row-major order', () => {
    const positions = shapes
      .filter(shape => sizeOf(shape) > 0)
      .chain(shape => fc.tuple(fc.constant(shape), fc.nat(sizeOf(shape) - 1)))
    fc.assert(
      fc.property(positions, ([shape, flat]) => {
        const strides = stridesOf(shape)
        let rest = flat
        const index = strides.map(stride => {
          const i = Math.floor(rest / stride)
          rest %= stride
          return i
        })
        expect(index.every((i, axis) => i < shape[axis])).toBe(true)
        expect(index.reduce((sum, i, axis) => sum + i * strides[axis], 0)).toBe(flat)
      }),
      { seed: 8 },
    )
  })

  test('axes count from either end; others are rejected with the valid range', () => {
    expect(normalizeAxis('sum', -1, 3)).toBe(2)
    expect(normalizeAxis('sum', 0, 3)).toBe(0)
    for (const axis of [3, -4, 0.5, Number.NaN]) {
      expect(() => normalizeAxis('sum', axis, 3)).toThrow(
        /^sum: axis .* does not exist in a tensor of rank 3; pass an axis from -3 to 2/,
      )
    }
  })
})
