import { Random } from '@moe/core'
import { expect, test } from 'vitest'
import { runOp, testBackend } from '../../test-backend.ts'

test.each([
  { N: 7, K: 3, E: 5 },
  { N: 0, K: 2, E: 4 },
  { N: 2048, K: 4, E: 16 },
  { N: 20_000, K: 8, E: 256 },
  { N: 9, K: 1, E: 1 },
])('dispatchPlan sorts slots by expert: $N tokens, $K choices, $E experts', async ({ N, K, E }) => {
  const slots = N * K
  const indices = Int32Array.from(new Random(2).uniform(slots), u => Math.floor(u * E))
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
  for (const threads of [1, 2]) {
    const backend = await testBackend({ threads })
    const input = { data: indices, shape: [N, K], dtype: 'i32' as const }
    const got = await runOp(backend, 'dispatchPlan', [input], { experts: E }, outputs)
    expect(got[0]).toEqual(Int32Array.from(order))
    expect(got.slice(1)).toEqual([positions, offsets, counts])
    backend.dispose()
  }
})

test('an expert out of range is an error and leaks no memory', async () => {
  const backend = await testBackend()
  const outputs = [2, 2, 4, 3].map(n => ({ shape: [n], dtype: 'i32' as const }))
  for (const bad of [3, -1]) {
    const input = { data: [0, bad], shape: [1, 2], dtype: 'i32' as const }
    await expect(runOp(backend, 'dispatchPlan', [input], { experts: 3 }, outputs)).rejects.toThrow(`expert ${bad}`)
  }
  expect(backend.stats().handles).toBe(2)
  backend.dispose()
})
