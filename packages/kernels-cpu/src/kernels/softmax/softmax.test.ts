import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'

const { NaN: nan, NEGATIVE_INFINITY: low, POSITIVE_INFINITY: high } = Number

describe.each(await availableIsas())('softmax on %s', isa => {
  const shapes = [
    [1, 1],
    [3, 7],
    [5, 16],
    [33, 65],
    [1, 5000],
    [700, 130],
    [0, 4],
    [4, 0],
  ]

  test.each(shapes)('matches f64 loops for %i rows of %i, with equal bits on 1 and 2 threads', async (rows, length) => {
    const random = new Random(rows + length)
    const x = random.normal(rows * length).map(v => v * 10)
    const dy = random.normal(rows * length)
    const y = new Float64Array(x.length)
    const dx = new Float64Array(x.length)
    for (let at = 0; at < x.length; at += length) {
      const row = [...x.subarray(at, at + length)]
      const max = Math.max(...row)
      const sum = row.reduce((total, v) => total + Math.exp(v - max), 0)
      row.forEach((v, i) => {
        y[at + i] = Math.exp(v - max) / sum
      })
      const dot = row.reduce((total, _, i) => total + y[at + i] * dy[at + i], 0)
      row.forEach((_, i) => {
        dx[at + i] = y[at + i] * (dy[at + i] - dot)
      })
    }
    const shape = [rows, length]
    const outputs = [{ shape, dtype: 'f32' as const }]
    const bits: unknown[] = []
    for (const threads of [1, 2]) {
      const backend = await testBackend({ isa, threads })
      const [got] = await runOp(backend, 'softmax', [{ data: x, shape }], {}, outputs)
      expect(worstError(got, y)).toBeLessThan(1e-6)
      const [back] = await runOp(
        backend,
        'softmaxBackward',
        [
          { data: y, shape },
          { data: dy, shape },
        ],
        {},
        outputs,
      )
      expect(worstError(back, dx)).toBeLessThan(3e-6)
      bits.push([got, back])
      backend.dispose()
    }
    expect(bits[1]).toEqual(bits[0])
  })

  test('handles infinities and NaN', async () => {
    const backend = await testBackend({ isa })
    const rows = [
      [low, low, low, low, low],
      [low, 3, low, 3, low],
      [0, nan, 1, 2, 3],
      [0, 1, high, 2, 3],
      [3e38, -3e38, 3e38, 0, low],
    ]
    const shape = [5, 5]
    const [y] = await runOp(backend, 'softmax', [{ data: rows.flat(), shape }], {}, [{ shape, dtype: 'f32' }])
    const row = (i: number) => [...y.subarray(5 * i, 5 * i + 5)]
    expect(row(0)).toEqual([0, 0, 0, 0, 0])
    expect(row(1)).toEqual([0, 0.5, 0, 0.5, 0])
    expect(row(2)).toEqual([nan, nan, nan, nan, nan])
    expect(row(3)).toEqual([nan, nan, nan, nan, nan])
    expect(row(4)).toEqual([0.5, 0, 0.5, 0, 0])
    backend.dispose()
  })
})
