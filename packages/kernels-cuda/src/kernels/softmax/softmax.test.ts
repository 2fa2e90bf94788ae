import { softmax } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'
import { compareWithReference, normal } from '../../test-compare-with-reference.ts'

const { NaN: nan, NEGATIVE_INFINITY: low, POSITIVE_INFINITY: high } = Number

describe.skipIf(unavailable)('softmax', () => {
  test.each([
    [1, 1],
    [9, 1024],
    [3, 1023],
    [2, 1028],
    [3, 1025],
    [2, 8196],
    [3, 9001],
    [0, 4],
    [4, 0],
  ])('%i rows of %i', async (rows, length) => {
    await compareWithReference([normal([rows, length], 3)], x => [softmax(x)])
  })

  test.each([5, 1100])('handles infinities and NaN in rows of %i', async length => {
    const rows = [
      [low, low, low, low, low],
      [low, 3, low, 3, low],
      [0, nan, 1, 2, 3],
      [0, 1, high, 2, 3],
      [3e38, -3e38, 3e38, 0, low],
    ]
    const shape = [5, length]
    const data = rows.flatMap(row => [...row, ...new Array(length - 5).fill(low)])
    const backend = await testBackend()
    const [y] = await runOp(backend, 'softmax', [{ data, shape }], {}, [{ shape, dtype: 'f32' }])
    backend.dispose()
    const start = (i: number) => [...y.subarray(length * i, length * i + 5)]
    expect(start(0)).toEqual([0, 0, 0, 0, 0])
    expect(start(1)).toEqual([0, 0.5, 0, 0.5, 0])
    expect(start(2)).toEqual([nan, nan, nan, nan, nan])
    expect(start(3)).toEqual([nan, nan, nan, nan, nan])
    expect(start(4)).toEqual([0.5, 0, 0.5, 0, 0])
  })
})
