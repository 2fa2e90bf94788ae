import { Random, type RouterAttrs } from '@moe/core'
import { describe, expect, test } from 'vitest'
import type { CpuOptions } from '../../backend.ts'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'

interface Case extends Partial<RouterAttrs> {
  readonly N: number
  readonly E: number
  readonly topK: number
}

const cases: readonly Case[] = [
  { N: 50, E: 16, topK: 4, groups: 4, topGroups: 2 },
  { N: 50, E: 16, topK: 4, groups: 4, topGroups: 2, scoring: 'softmax', groupScore: 'max', normalize: false, scale: 1 },
  { N: 700, E: 256, topK: 8, groups: 8, topGroups: 4 },
  {
    N: 9,
    E: 160,
    topK: 6,
    groups: 8,
    topGroups: 3,
    scoring: 'softmax',
    groupScore: 'max',
    normalize: false,
    scale: 16,
  },
  { N: 33, E: 5, topK: 5 },
  { N: 33, E: 1, topK: 1 },
  { N: 20, E: 12, topK: 3, groups: 12, topGroups: 5 },
  { N: 20, E: 200, topK: 90, groups: 100, topGroups: 70 },
  { N: 0, E: 8, topK: 2 },
]

const attrsOf = ({ N: _n, E: _e, ...given }: Case): RouterAttrs => {
  return { scoring: 'sigmoid', groups: 1, topGroups: 1, groupScore: 'top2', normalize: true, scale: 2.5, ...given }
}

/** Returns the indices of the k largest values in descending order, ties by index, NaN as -Infinity. */
function best(values: readonly number[], k: number, allowed: (i: number) => boolean = () => true): number[] {
  const key = (i: number) => (Number.isNaN(values[i]) ? Number.NEGATIVE_INFINITY : values[i])
  const order = [...values.keys()].filter(allowed).sort((a, b) => (key(a) === key(b) ? a - b : key(b) - key(a)))
  return order.slice(0, k)
}

/** Returns the experts chosen for one token, from its scores. */
function choose(scores: readonly number[], bias: ArrayLike<number>, attrs: RouterAttrs): number[] {
  const choice = scores.map((s, e) => Math.fround(s + bias[e]))
  const size = scores.length / attrs.groups
  const groupScores = Array.from({ length: attrs.groups }, (_, g) => {
    const members = choice.slice(g * size, (g + 1) * size)
    if (attrs.groupScore === 'max') return Math.max(...members)
    return best(members, 2).reduce((sum, i) => Math.fround(sum + members[i]), 0)
  })
  const kept = new Set(best(groupScores, attrs.topGroups))
  return best(choice, attrs.topK, e => kept.has(Math.floor(e / size)))
}

async function route(c: Case, logits: ArrayLike<number>, bias: ArrayLike<number>, options: CpuOptions) {
  const { N, E, topK } = c
  const backend = await testBackend(options)
  const inputs = [
    { data: logits, shape: [N, E] },
    { data: bias, shape: [E] },
  ]
  const got = await runOp(backend, 'routerTopk', inputs, attrsOf(c), [
    { shape: [N, topK], dtype: 'f32' },
    { shape: [N, topK], dtype: 'i32' },
    { shape: [N, E], dtype: 'f32' },
  ])
  backend.dispose()
  return got
}

describe.each(await availableIsas())('routerTopk on %s', isa => {
  const named = cases.map(c => ({ scoring: 'sigmoid' as const, groups: 1, topGroups: 1, ...c }))
  test.each(named)('matches f64 loops: $N tokens, $topK of $E, $topGroups of $groups groups, $scoring', async c => {
    const attrs = attrsOf(c)
    const { N, E, topK } = c
    const random = new Random(8)
    const logits = random.normal(N * E).map(v => v * 2)
    const bias = random.normal(E).map(v => v * (attrs.scoring === 'sigmoid' ? 0.5 : 0.02))
    const [dweights, dscores] = [random.normal(N * topK), random.normal(N * E)]
    const [weights, indices, scores] = await route(c, logits, bias, { isa, threads: 1 })
    expect(await route(c, logits, bias, { isa, threads: 2 })).toEqual([weights, indices, scores])
    const dlogits = new Float64Array(N * E)
    for (let n = 0; n < N; n++) {
      const row = [...logits.subarray(n * E, (n + 1) * E)]
      const sum = row.reduce((total, x) => total + Math.exp(x), 0)
      const exact = row.map(x => (attrs.scoring === 'sigmoid' ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / sum))
      const own = [...scores.subarray(n * E, (n + 1) * E)]
      expect(worstError(own, exact)).toBeLessThan(1e-6)
      const chosen = choose(own, bias, attrs)
      expect([...indices.subarray(n * topK, (n + 1) * topK)]).toEqual(chosen)
      const total = attrs.normalize ? chosen.reduce((t, e) => t + exact[e], 1e-20) : 1
      const want = chosen.map(e => (exact[e] / total) * attrs.scale)
      expect(worstError(weights.subarray(n * topK, (n + 1) * topK), want)).toBeLessThan(1e-6)
      const ds = [...dscores.subarray(n * E, (n + 1) * E)]
      const dw = chosen.map((_, k) => dweights[n * topK + k] * attrs.scale)
      const dot = chosen.reduce((t, e, k) => t + dw[k] * exact[e], 0)
      chosen.forEach((e, k) => {
        ds[e] += attrs.normalize ? (dw[k] - dot / total) / total : dw[k]
      })
      const mean = ds.reduce((t, d, e) => t + d * exact[e], 0)
      ds.forEach((d, e) => {
        dlogits[n * E + e] = exact[e] * (attrs.scoring === 'sigmoid' ? (1 - exact[e]) * d : d - mean)
      })
    }
    const inputs = [
      { data: scores, shape: [N, E] },
      { data: indices, shape: [N, topK], dtype: 'i32' as const },
      { data: dweights, shape: [N, topK] },
      { data: dscores, shape: [N, E] },
    ]
    for (const threads of [1, 2]) {
      const backend = await testBackend({ isa, threads })
      const [got] = await runOp(backend, 'routerTopkBackward', inputs, attrs, [{ shape: [N, E], dtype: 'f32' }])
      expect(worstError(got, dlogits)).toBeLessThan(3e-6)
      backend.dispose()
    }
  })

  test('ties go to the lowest index, and -0 equals 0', async () => {
    const c = { N: 1, E: 40, topK: 40 }
    const [, indices] = await route(c, new Float32Array(40), new Float32Array(40), { isa })
    expect([...indices]).toEqual([...Array(40).keys()])
    const bias = Float32Array.from({ length: 40 }, (_, e) => (e % 2 ? -0.5 : -0.5 - 1e-9))
    expect((await route(c, new Float32Array(40), bias, { isa }))[1]).toEqual(indices)
  })

  test('experts outside the selected groups are never chosen, whatever the signs of scores', async () => {
    const c = { N: 1, E: 8, topK: 4, groups: 4, topGroups: 2 }
    const logits = new Float32Array(8)
    const bias = Float32Array.of(-9, -9, -3, -3, -5, -5, -2, -7)
    expect([...(await route(c, logits, bias, { isa }))[1]]).toEqual([6, 2, 3, 7])
    const endless = Float32Array.of(0, 0, Number.NEGATIVE_INFINITY, 5, 9, Number.NEGATIVE_INFINITY, 0, 1)
    const [, indices] = await route({ ...c, groupScore: 'max' }, logits, endless, { isa })
    expect([...indices]).toEqual([4, 3, 2, 5])
  })

  test('NaN is chosen last and only affects its own token', async () => {
    const c = { N: 2, E: 6, topK: 6, normalize: false, scale: 1 }
    const logits = Float32Array.of(1, Number.NaN, 3, 2, Number.NaN, 0, 0, 1, 2, 3, 4, 5)
    const [weights, indices] = await route(c, logits, new Float32Array(6), { isa })
    expect([...indices]).toEqual([2, 3, 0, 5, 1, 4, 5, 4, 3, 2, 1, 0])
    expect([...weights].map(Number.isNaN)).toEqual([0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0].map(Boolean))
  })
})
