import { Random } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

// Rows processed by a warp and by a block, columns with one and with several threads, each with partial tiles.
test.skipIf(unavailable).each([
  [[3, 200], 1],
  [[2, 5003], 1],
  [[1, 4096], 1],
  [[2, 150, 5], 1],
  [[2, 9, 70], 1],
])('adds up %j along axis %i', async (shape, axis) => {
  const backend = await testBackend()
  const count = shape[axis]
  const inner = shape.length === 3 ? shape[2] : 1
  const size = shape[0] * count * inner
  const floats = new Random(size).normal(size)
  const integers = Int32Array.from(floats, v => v * 2 ** 30)
  for (const [dtype, data] of [
    ['f32', floats],
    ['i32', integers],
  ] as const) {
    const [y] = await runOp(backend, 'cumsum', [{ data, shape, dtype }], { axis }, [{ shape, dtype }])
    const sums = Float64Array.from(data)
    sums.forEach((_, i) => {
      if (Math.floor(i / inner) % count > 0) sums[i] += sums[i - inner]
      if (dtype === 'i32') expect(y[i]).toBe(sums[i] | 0)
      else expect(Math.abs(y[i] - sums[i])).toBeLessThan(3e-5)
    })
  }
  backend.dispose()
})
