import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'

const sizes = [
  [1],
  [0],
  [5, 0, 100_003, 17],
  Array.from({ length: 28 }, (_, i) => i),
  Array.from({ length: 29 }, (_, i) => i * 7),
  Array.from({ length: 90 }, (_, i) => 1 + ((i * 997) % 20_000)),
]

describe.each(await availableIsas())('globalNorm on %s', isa => {
  test.each(sizes.map(list => ({ list, count: list.length })))('is exact for $count tensors', async ({ list }) => {
    const random = new Random(1)
    const inputs = list.map(n => ({ data: random.normal(n), shape: [n] }))
    let squares = 0
    for (const { data } of inputs) for (const x of data) squares += x * x
    for (const threads of [1, 2]) {
      const backend = await testBackend({ isa, threads })
      const [norm] = await runOp(backend, 'globalNorm', inputs, { parts: false }, [{ shape: [], dtype: 'f32' }])
      expect(norm).toEqual(Float32Array.of(Math.sqrt(squares)))
      const [parts] = await runOp(backend, 'globalNorm', inputs, { parts: true }, [{ shape: [3], dtype: 'f32' }])
      expect(parts[0]).toBe(norm[0])
      expect(Math.abs(parts[0] + parts[1] + parts[2] - Math.sqrt(squares))).toBeLessThanOrEqual(1e-12 * norm[0])
      backend.dispose()
    }
  })

  test('squares large and small numbers without overflow or underflow', async () => {
    const backend = await testBackend({ isa })
    for (const size of [1e30, 1e-30]) {
      const inputs = [
        { data: [3 * size, 0], shape: [2] },
        { data: [4 * size], shape: [1] },
      ]
      const [norm] = await runOp(backend, 'globalNorm', inputs, { parts: false }, [{ shape: [], dtype: 'f32' }])
      expect(norm[0] / (5 * size)).toBeCloseTo(1, 6)
    }
    backend.dispose()
  })
})
