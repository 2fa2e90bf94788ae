import {
  type Backend,
  combineTokens,
  dispatchPlan,
  globalNorm,
  mlaKeyValue,
  permuteTokens,
  Random,
  type RouterAttrs,
  routerTopk,
} from '@moe/core'
import { compareWithReference, runOp, tolerances } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend } from '../test-gpu.ts'
import { integers, normal } from '../test-inputs.ts'

const backend = (await testBackend()) as Backend

const v3 = { scoring: 'sigmoid', groups: 1, topGroups: 1, groupScore: 'top2', normalize: true, scale: 2.5 } as const
const v2 = { ...v3, scoring: 'softmax', groupScore: 'max', normalize: false } as const

describe.skipIf(backend === null)('routerTopk', () => {
  const cases: ReadonlyArray<{ readonly N: number; readonly E: number } & RouterAttrs> = [
    { ...v3, N: 30, E: 256, topK: 8, groups: 8, topGroups: 4 },
    { ...v2, N: 9, E: 160, topK: 6, groups: 8, topGroups: 3, scale: 16 },
    { ...v3, N: 12, E: 512, topK: 10, groups: 16, topGroups: 5 },
    { ...v3, N: 3, E: 1024, topK: 129 },
    { ...v2, N: 7, E: 384, topK: 8 },
    { ...v3, N: 20, E: 12, topK: 3, groups: 12, topGroups: 5 },
    { ...v3, N: 20, E: 15, topK: 4, groups: 3, topGroups: 2, scoring: 'softmax' },
    { ...v3, N: 13, E: 5, topK: 5 },
    { ...v3, N: 3, E: 1, topK: 1 },
    { ...v3, N: 0, E: 8, topK: 2 },
  ]
  test.each(cases)('$N tokens, $topK of $E, $topGroups of $groups groups, $scoring', async ({ N, E, ...attrs }) => {
    const inputs = [normal([N, E], 2), normal([E], attrs.scoring === 'softmax' ? 0.001 : 0.3)]
    await compareWithReference(backend, inputs, (logits, bias) => {
      const { weights, indices, scores } = routerTopk(logits, bias, attrs)
      return [weights, indices, scores]
    })
  })

  const chosen = async (logits: readonly number[], bias: readonly number[], attrs: RouterAttrs) => {
    const experts = logits.length
    const inputs = [
      { data: logits, shape: [1, experts] },
      { data: bias, shape: [experts] },
    ]
    const outputs = [
      { shape: [1, attrs.topK], dtype: 'f32' },
      { shape: [1, attrs.topK], dtype: 'i32' },
      { shape: [1, experts], dtype: 'f32' },
    ] as const
    return [...(await runOp(backend, 'routerTopk', inputs, attrs, outputs))[1]]
  }
  const zeros = new Array<number>(8).fill(0)

  test('NaN is chosen last, and so are groups whose score includes it', async () => {
    const { NaN: nan } = Number
    const logits = [nan, 5, 1, 2, 0, nan, nan, 3]
    expect(await chosen(logits, zeros, { ...v3, topK: 7 })).toEqual([1, 7, 3, 2, 4, 0, 5])
    const one = { ...v3, topK: 2, groups: 4, topGroups: 1 }
    expect(await chosen(logits, zeros, one)).toEqual([3, 2])
    expect(await chosen(logits, zeros, { ...one, groupScore: 'max' })).toEqual([3, 2])
  })

  test('the first of equal groups is selected, even if another contains the best expert', async () => {
    const bias = [0, 0, 2, 2, 3, 1, 2, 2]
    expect(await chosen(zeros, bias, { ...v3, topK: 1, groups: 4, topGroups: 1 })).toEqual([2])
    expect(await chosen(zeros, bias, { ...v3, topK: 3, groups: 4, topGroups: 2 })).toEqual([4, 2, 3])
  })
})

describe.skipIf(backend === null)('permuteTokens and combineTokens', () => {
  test.each([
    { N: 1, K: 1, E: 1, D: 3 },
    { N: 0, K: 2, E: 4, D: 3 },
    { N: 37, K: 7, E: 5, D: 129 },
    { N: 200, K: 8, E: 64, D: 4 },
    { N: 513, K: 1, E: 300, D: 2 },
  ])('$N tokens, $K of $E experts, $D features', async ({ N, K, E, D }) => {
    const random = new Random(N)
    const indices = Array.from({ length: N * K }, () => random.integer(E))
    const inputs = [normal([N, D]), normal([N, K]), integers(indices, [N, K])]
    await compareWithReference(backend, inputs, (x, weights, chosen) => {
      const plan = dispatchPlan(chosen, E)
      const rows = permuteTokens(x, plan)
      const { order, positions, offsets, counts } = plan
      return [combineTokens(rows.mul(rows), weights, plan), rows, order, positions, offsets, counts]
    })
  })
})

describe.skipIf(backend === null)('mlaKeyValue', () => {
  test.each([
    { B: 2, S: 5, H: 3, N: 4, R: 2, V: 6 },
    { B: 1, S: 3, H: 1, N: 0, R: 4, V: 1 },
    { B: 1, S: 2, H: 2, N: 5, R: 0, V: 3 },
  ])('$H heads, $N + $R features of a key, $V of a value', async ({ B, S, H, N, R, V }) => {
    await compareWithReference(backend, [normal([B, S, H, N + V]), normal([B, S, 1, R])], (kv, ropeKey) => {
      const { k, v } = mlaKeyValue(kv, ropeKey, N)
      return [k, v]
    })
  })
})

describe.skipIf(backend === null)('globalNorm', () => {
  test.each([1, 7, 8, 15])('%i tensors', async count => {
    const inputs = Array.from({ length: count }, (_, n) => normal([[1, 0, 5000, 129][n % 4], 1 + n]))
    await compareWithReference(backend, inputs, (...tensors) => [globalNorm(tensors)], tolerances.elementwise)
  })
})
