import { combineTokens, dispatchPlan, permuteTokens, Random } from '@moe/core'
import { describe, test } from 'vitest'
import { unavailable } from '../../test-backend.ts'
import { compareWithReference, normal } from '../../test-compare-with-reference.ts'

describe.skipIf(unavailable)('permuteTokens and combineTokens', () => {
  test.each([
    { N: 40, K: 4, D: 256 },
    { N: 9, K: 8, D: 33 },
    { N: 3, K: 2, D: 4100 },
    { N: 2, K: 1, D: 2051 },
    { N: 1, K: 1, D: 1 },
    { N: 0, K: 2, D: 8 },
    { N: 6, K: 2, D: 0 },
  ])('$N tokens of $D, $K copies', async ({ N, K, D }) => {
    const experts = Int32Array.from(new Random(4).uniform(N * K), u => Math.floor(u * 8))
    const indices = { data: experts, shape: [N, K], dtype: 'i32' as const }
    await compareWithReference(
      [normal([N, D]), normal([N * K, D]), normal([N, K]), indices],
      (x, y, weights, chosen) => {
        const plan = dispatchPlan(chosen, 8)
        return [permuteTokens(x, plan), combineTokens(y, weights, plan)]
      },
    )
  })
})
