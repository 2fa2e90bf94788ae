import { Random, type ReduceCode } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'
import { columnLaunch, reducePasses, rowLaunch } from './reduce.ts'

test('neighbouring axes are reduced in one pass', () => {
  expect(reducePasses([5, 6, 7], [1, 2])).toEqual([[5, 42, 1]])
  expect(reducePasses([5, 1, 7], [0, 2])).toEqual([[1, 35, 1]])
  expect(reducePasses([5, 6, 7], [0, 2])).toEqual([
    [30, 7, 1],
    [1, 5, 6],
  ])
})

test.each([
  [1, 0, 1],
  [1, 1, 1],
  [100_000, 3, 1],
  [1, 1_000_003, 1],
  [511, 20_000, 1],
])('chunks of rows cover %i x %i', (outer, count) => {
  const { grid, width, chunk, chunks } = rowLaunch(outer, count)
  expect(chunk * chunks).toBeGreaterThanOrEqual(count)
  expect(chunk * (chunks - 1)).toBeLessThan(Math.max(count, 1))
  expect(grid * (256 / width)).toBeGreaterThanOrEqual(outer * chunks)
})

test.each([
  [1, 0, 4],
  [1, 16_384, 7168],
  [1, 16_384, 9],
  [1, 100_000, 2],
  [16_384, 8, 512],
  [100_000, 2, 3],
])('chunks of columns cover %i x %i x %i', (outer, count, inner) => {
  const { grid, width, chunk, chunks } = columnLaunch(outer, count, inner)
  expect(chunk * chunks).toBeGreaterThanOrEqual(count)
  expect(chunk * (chunks - 1)).toBeLessThan(Math.max(count, 1))
  expect((grid / chunks) * width).toBeGreaterThanOrEqual((outer * inner) / (inner % 4 === 0 ? 4 : 1))
})

const start = { sum: 0, max: Number.NEGATIVE_INFINITY }

function plain(code: ReduceCode, x: Float32Array, [outer, count, inner]: number[]): number[] {
  const y = new Array<number>(outer * inner).fill(start[code])
  x.forEach((v, i) => {
    const at = Math.floor(i / count / inner) * inner + (i % inner)
    y[at] = code === 'sum' ? y[at] + v : Math.max(y[at], v)
  })
  return y
}

describe.skipIf(unavailable)('on the device', () => {
  test.each([
    [1, 40_000, 1],
    [3, 20_001, 1],
    [5, 300, 1],
    [70, 3, 1],
    [1, 2100, 8],
    [1, 1100, 3],
    [90, 2, 5],
    [2, 9, 132],
  ])('[%i, %i, %i] is reduced along its second axis', async (...shape) => {
    const backend = await testBackend()
    const [outer, , inner] = shape
    const size = shape[0] * shape[1] * shape[2]
    const x = new Random(size).normal(size)
    const outputs = [{ shape: [outer, 1, inner], dtype: 'f32' }] as const
    for (const code of ['sum', 'max'] as const) {
      const [y] = await runOp(backend, 'reduce', [{ data: x, shape }], { code, axes: [1] }, outputs)
      plain(code, x, shape).forEach((expected, i) => {
        expect(Math.abs(y[i] - expected)).toBeLessThan(code === 'sum' ? 1e-4 : 1e-12)
      })
    }
    x[size >> 1] = Number.NaN
    const [max] = await runOp(backend, 'reduce', [{ data: x, shape }], { code: 'max', axes: [1] }, outputs)
    expect(max.filter(Number.isNaN)).toHaveLength(1)
    backend.dispose()
  })

  test('integers wrap around', async () => {
    const backend = await testBackend()
    const data = [2 ** 31 - 1, 1, 5, -7]
    const inputs = [{ data, shape: [2, 2], dtype: 'i32' }] as const
    for (const axes of [[0], [1]]) {
      const shape = [2, 2].map((n, axis) => (axes.includes(axis) ? 1 : n))
      const [y] = await runOp(backend, 'reduce', inputs, { code: 'sum', axes }, [{ shape, dtype: 'i32' }])
      expect([...y]).toEqual(axes[0] === 0 ? [(2 ** 31 + 4) | 0, -6] : [-(2 ** 31), -2])
    }
    backend.dispose()
  })
})
