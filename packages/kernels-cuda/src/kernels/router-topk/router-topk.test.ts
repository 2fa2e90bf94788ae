import { type RouterAttrs, routerTopk } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'
import { compareWithReference, normal } from '../../test-compare-with-reference.ts'

interface Case extends Partial<RouterAttrs> {
  readonly N: number
  readonly E: number
  readonly topK: number
}

const v2 = { scoring: 'softmax', groupScore: 'max', normalize: false } as const

const cases: readonly Case[] = [
  { N: 30, E: 256, topK: 8, groups: 8, topGroups: 4 },
  { N: 9, E: 160, topK: 6, groups: 8, topGroups: 3, ...v2, scale: 16 },
  { N: 12, E: 512, topK: 10, groups: 16, topGroups: 5 },
  { N: 7, E: 384, topK: 8, ...v2 },
  { N: 5, E: 320, topK: 32, groups: 32, topGroups: 9 },
  { N: 20, E: 12, topK: 3, groups: 12, topGroups: 5 },
  { N: 20, E: 15, topK: 4, groups: 3, topGroups: 2, scoring: 'softmax' },
  { N: 13, E: 5, topK: 5 },
  { N: 3, E: 1, topK: 1 },
  { N: 0, E: 8, topK: 2 },
]

const attrsOf = ({ N: _n, E: _e, ...given }: Case): RouterAttrs => {
  return { scoring: 'sigmoid', groups: 1, topGroups: 1, groupScore: 'top2', normalize: true, scale: 2.5, ...given }
}

async function choices(c: Case, logits: ArrayLike<number>, bias: ArrayLike<number>) {
  const { N, E, topK } = c
  const backend = await testBackend()
  const inputs = [
    { data: logits, shape: [N, E] },
    { data: bias, shape: [E] },
  ]
  const [weights, indices] = await runOp(backend, 'routerTopk', inputs, attrsOf(c), [
    { shape: [N, topK], dtype: 'f32' },
    { shape: [N, topK], dtype: 'i32' },
    { shape: [N, E], dtype: 'f32' },
  ])
  backend.dispose()
  return { weights: [...weights], indices: [...indices] }
}

describe.skipIf(unavailable)('routerTopk', () => {
  test.each(cases.map(c => ({ scoring: 'sigmoid' as const, groups: 1, topGroups: 1, ...c })))(
    '$N tokens, $topK of $E, $topGroups of $groups groups, $scoring',
    async c => {
      const bias = normal([c.E], c.scoring === 'softmax' ? 0.001 : 0.3)
      await compareWithReference([normal([c.N, c.E], 2), bias], (logits, b) => {
        const { weights, indices, scores } = routerTopk(logits, b, attrsOf(c))
        return [weights, indices, scores]
      })
    },
  )

  test('ties go to the lowest index, and zeros of both signs are equal', async () => {
    const c = { N: 1, E: 300, topK: 32 }
    const first = [...Array(32).keys()]
    expect((await choices(c, new Float32Array(300), new Float32Array(300))).indices).toEqual(first)
    const bias = Float32Array.from({ length: 300 }, (_, e) => (e % 2 ? -0.5 : -0.5 - 1e-9))
    expect((await choices(c, new Float32Array(300), bias)).indices).toEqual(first)
    const groups = { ...c, topK: 8, groups: 10, topGroups: 3 }
    expect((await choices(groups, new Float32Array(300), new Float32Array(300))).indices).toEqual(first.slice(0, 8))
  })

  test('experts outside of the selected groups are never chosen, whatever the signs', async () => {
    const c = { N: 1, E: 8, topK: 4, groups: 4, topGroups: 2 }
    const logits = new Float32Array(8)
    const bias = Float32Array.of(-9, -9, -3, -3, -5, -5, -2, -7)
    expect((await choices(c, logits, bias)).indices).toEqual([6, 2, 3, 7])
    const endless = Float32Array.of(0, 0, Number.NEGATIVE_INFINITY, 5, 9, Number.NEGATIVE_INFINITY, 0, 1)
    expect((await choices({ ...c, groupScore: 'max' }, logits, endless)).indices).toEqual([4, 3, 2, 5])
  })

  test('NaN is chosen last, ranks its group last by maximum, and affects only its token', async () => {
    const { NaN: nan } = Number
    const c = { N: 2, E: 6, topK: 6, normalize: false, scale: 1 }
    const logits = Float32Array.of(1, nan, 3, 2, nan, 0, 0, 1, 2, 3, 4, 5)
    const { weights, indices } = await choices(c, logits, new Float32Array(6))
    expect(indices).toEqual([2, 3, 0, 5, 1, 4, 5, 4, 3, 2, 1, 0])
    expect(weights.map(Number.isNaN)).toEqual([0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0].map(Boolean))
    const groups: Case = { N: 1, E: 6, topK: 2, groups: 3, topGroups: 1, groupScore: 'max' }
    expect((await choices(groups, Float32Array.of(9, nan, 1, 0, 0, 0), new Float32Array(6))).indices).toEqual([2, 3])
  })
})
