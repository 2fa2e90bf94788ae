import { Random } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

describe.skipIf(unavailable)('dispatchPlan', () => {
  test.each([
    { N: 7, K: 3, E: 5 },
    { N: 0, K: 2, E: 4 },
    { N: 9, K: 1, E: 1 },
    { N: 2048, K: 4, E: 16 },
    { N: 1500, K: 8, E: 512 },
    { N: 701, K: 3, E: 2000 },
    { N: 33_000, K: 8, E: 64 },
  ])('$N tokens, $K choices, $E experts', async ({ N, K, E }) => {
    const slots = N * K
    const indices = Int32Array.from(new Random(2).uniform(slots), u => Math.floor(u * u * E))
    const order = [...indices.keys()].sort((a, b) => indices[a] - indices[b] || a - b)
    const positions = new Int32Array(slots)
    order.forEach((s, p) => {
      positions[s] = p
    })
    const counts = new Int32Array(E)
    for (const e of indices) counts[e]++
    const offsets = new Int32Array(E + 1)
    counts.forEach((n, e) => {
      offsets[e + 1] = offsets[e] + n
    })
    const outputs = [slots, slots, E + 1, E].map(n => ({ shape: [n], dtype: 'i32' as const }))
    const backend = await testBackend()
    const input = { data: indices, shape: [N, K], dtype: 'i32' as const }
    const got = await runOp(backend, 'dispatchPlan', [input], { experts: E }, outputs)
    backend.dispose()
    expect(got[0]).toEqual(Int32Array.from(order))
    expect(got.slice(1)).toEqual([positions, offsets, counts])
  })

  test('clamps indices of experts, and writes nothing out of bounds', async () => {
    const backend = await testBackend()
    const outputs = [4, 4, 4, 3].map(n => ({ shape: [n], dtype: 'i32' as const }))
    const input = { data: [1, 3, -1, 2 ** 30], shape: [2, 2], dtype: 'i32' as const }
    const got = await runOp(backend, 'dispatchPlan', [input], { experts: 3 }, outputs)
    backend.dispose()
    expect(got.map(x => [...x])).toEqual([
      [2, 0, 1, 3],
      [1, 2, 0, 3],
      [0, 1, 2, 4],
      [1, 1, 2],
    ])
  })
})
