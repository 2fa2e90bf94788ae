import { Random } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

const sizes = [
  [1],
  [0],
  [5, 0, 200_003, 17],
  Array.from({ length: 64 }, (_, i) => i),
  Array.from({ length: 65 }, (_, i) => i * 7),
  Array.from({ length: 150 }, (_, i) => ((i * 997) % 2000) + (i % 50 === 3 ? 40_000 : 0)),
]

async function normOf(tensors: ReadonlyArray<ArrayLike<number>>): Promise<{ norm: number; parts: ArrayLike<number> }> {
  const backend = await testBackend()
  const inputs = tensors.map(data => ({ data, shape: [data.length] }))
  const [norm] = await runOp(backend, 'globalNorm', inputs, { parts: false }, [{ shape: [], dtype: 'f32' }])
  const [parts] = await runOp(backend, 'globalNorm', inputs, { parts: true }, [{ shape: [3], dtype: 'f32' }])
  backend.dispose()
  return { norm: norm[0], parts }
}

describe.skipIf(unavailable)('globalNorm', () => {
  test.each(sizes.map(list => ({ list, count: list.length })))('$count tensors', async ({ list }) => {
    const random = new Random(1)
    const tensors = list.map(n => random.normal(n))
    let squares = 0
    for (const data of tensors) for (const x of data) squares += x * x
    const { norm, parts } = await normOf(tensors)
    expect(norm).toBe(Math.fround(Math.sqrt(squares)))
    expect(parts[0]).toBe(norm)
    expect(Math.abs(parts[0] + parts[1] + parts[2] - Math.sqrt(squares))).toBeLessThanOrEqual(1e-12 * norm)
  })

  test('squares neither overflow nor underflow', async () => {
    for (const size of [1e30, 1e-30]) {
      const { norm } = await normOf([[3 * size, 0], [4 * size]])
      expect(norm / (5 * size)).toBeCloseTo(1, 6)
    }
  })
})
