import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'

describe.each(await availableIsas())(
  'permuteTokens on %s matches f64 loops, with equal bits on 1 and 2 threads',
  isa => {
    test.each([
      { N: 5, K: 2, D: 7 },
      { N: 300, K: 4, D: 256 },
      { N: 1, K: 1, D: 1 },
      { N: 64, K: 8, D: 33 },
      { N: 0, K: 2, D: 8 },
      { N: 6, K: 2, D: 0 },
    ])('$N tokens of $D, $K copies', async ({ N, K, D }) => {
      const random = new Random(4)
      const slots = N * K
      const keys = random.normal(slots)
      const order = Int32Array.from([...keys.keys()].sort((a, b) => keys[a] - keys[b]))
      const positions = new Int32Array(slots)
      order.forEach((s, p) => {
        positions[s] = p
      })
      const x = random.normal(N * D)
      const dy = random.normal(slots * D)
      const y = Float64Array.from(dy, (_, i) => x[Math.floor(order[Math.floor(i / D)] / K) * D + (i % D)])
      const dx = new Float64Array(N * D)
      dy.forEach((v, i) => {
        dx[Math.floor(order[Math.floor(i / D)] / K) * D + (i % D)] += v
      })
      const list = (data: Int32Array) => ({ data, shape: [slots], dtype: 'i32' as const })
      const bits: unknown[] = []
      for (const threads of [1, 2]) {
        const backend = await testBackend({ isa, threads })
        const inputs = [{ data: x, shape: [N, D] }, list(order), list(positions)]
        const [got] = await runOp(backend, 'permuteTokens', inputs, { topK: K }, [{ shape: [slots, D], dtype: 'f32' }])
        expect(worstError(got, y)).toBe(0)
        const back = [{ data: dy, shape: [slots, D] }, list(positions)]
        const [grad] = await runOp(backend, 'permuteTokensBackward', back, { topK: K }, [
          { shape: [N, D], dtype: 'f32' },
        ])
        expect(worstError(grad, dx)).toBeLessThan(1e-6)
        bits.push([got, grad])
        backend.dispose()
      }
      expect(bits[1]).toEqual(bits[0])
    })
  },
)
