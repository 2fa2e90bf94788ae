import { Random } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

// More than 4096 elements are sorted in chunks and merged; an odd number of chunks leaves one unpaired.
test.skipIf(unavailable).each([
  [3, 1, 1],
  [2, 100, 7],
  [1, 4097, 4097],
  [2, 9000, 50],
  [1, 13_000, 5000],
])('%i rows of %i, k = %i', async (rows, n, k) => {
  const backend = await testBackend()
  // Few distinct values, so there are many ties.
  const x = new Random(n).normal(rows * n).map(v => Math.round(v * 50))
  x[n >> 1] = Number.NaN
  x[n >> 2] = -0
  const shape = [rows, k]
  const [values, indices] = await runOp(backend, 'topk', [{ data: x, shape: [rows, n] }], { k }, [
    { shape, dtype: 'f32' },
    { shape, dtype: 'i32' },
  ])
  for (let row = 0; row < rows; row++) {
    const key = (i: number) => (Number.isNaN(x[row * n + i]) ? Number.NEGATIVE_INFINITY : x[row * n + i])
    const order = Array.from({ length: n }, (_, i) => i)
      .sort((a, b) => (key(a) === key(b) ? a - b : key(b) - key(a)))
      .slice(0, k)
    expect([...indices.subarray(row * k, (row + 1) * k)]).toEqual(order)
    expect([...values.subarray(row * k, (row + 1) * k)]).toEqual(order.map(i => x[row * n + i]))
  }
  backend.dispose()
})
