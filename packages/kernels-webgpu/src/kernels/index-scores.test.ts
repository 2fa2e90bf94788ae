import { type Backend, indexScores } from '@moe/core'
import { compareWithReference } from '@moe/core/testing'
import { afterEach, describe, expect, test } from 'vitest'
import { testBackend } from '../test-gpu.ts'
import { integers, normal } from '../test-inputs.ts'
import { limits } from './matmul.ts'

const backend = (await testBackend()) as Backend
const { groups } = limits

afterEach(() => {
  limits.groups = groups
})

describe.skipIf(backend === null)('indexScores', () => {
  // Two queries in the 48 rows of a tile, the last one alone.
  const [B, T, J, D, S] = [3, 5, 24, 20, 100]
  const inputs = [normal([B, T, J, D]), normal([B, T, J]), normal([B, S, D])]

  test('more texts than a launch has matrices', async () => {
    limits.groups = 2
    await compareWithReference(backend, inputs, (q, weights, keys) => [
      indexScores(q.detach(), weights.detach(), keys.detach()),
    ])
  })

  test('tiles of keys that only one of two queries sees, and that neither sees', async () => {
    const counts = [70, 3, 64, 65, 0, 1, 100, 12, -4, 63, 200, 64, 2, 2, 99]
    const { outputs } = await compareWithReference(
      backend,
      [...inputs, integers(counts, [B, T])],
      (q, weights, keys, limits) => [indexScores(q.detach(), weights.detach(), keys.detach(), { limits })],
    )
    const hidden = counts.reduce((sum, count) => sum + S - Math.min(S, Math.max(0, count)), 0)
    expect(Array.from(outputs[0]).filter(score => score === Number.NEGATIVE_INFINITY)).toHaveLength(hidden)
  })
})
