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

async function normOf(tensors: ReadonlyArray<ArrayLike<number>>): Promise<number> {
  const backend = await testBackend()
  const inputs = tensors.map(data => ({ data, shape: [data.length] }))
  const [norm] = await runOp(backend, 'globalNorm', inputs, {}, [{ shape: [], dtype: 'f32' }])
  backend.dispose()
  return norm[0]
}

describe.skipIf(unavailable)('globalNorm', () => {
  test.each(sizes.map(list => ({ list, count: list.length })))('$count tensors', async ({ list }) => {
    const random = new Random(1)
    const tensors = list.map(n => random.normal(n))
    let squares = 0
    for (const data of tensors) for (const x of data) squares += x * x
    expect(await normOf(tensors)).toBe(Math.fround(Math.sqrt(squares)))
  })

  test('large and small squares neither overflow nor vanish', async () => {
    for (const size of [1e30, 1e-30]) {
      expect((await normOf([[3 * size, 0], [4 * size]])) / (5 * size)).toBeCloseTo(1, 6)
    }
  })
})
