import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'

describe.each(await availableIsas())(
  'combineTokens on %s matches f64 loops, with equal bits on 1 and 2 threads',
  isa => {
    test.each([
      { N: 5, K: 2, D: 7 },
      { N: 300, K: 4, D: 256 },
      { N: 1, K: 1, D: 1 },
      { N: 64, K: 8, D: 33 },
      { N: 0, K: 2, D: 8 },
    ])('$N tokens of $D, $K choices', async ({ N, K, D }) => {
      const random = new Random(4)
      const slots = N * K
      const keys = random.normal(slots)
      const order = Int32Array.from([...keys.keys()].sort((a, b) => keys[a] - keys[b]))
      const positions = new Int32Array(slots)
      order.forEach((s, p) => {
        positions[s] = p
      })
      const [y, weights, dout] = [random.normal(slots * D), random.normal(slots), random.normal(N * D)]
      const out = new Float64Array(N * D)
      const dy = new Float64Array(slots * D)
      const dweights = new Float64Array(slots)
      for (let s = 0; s < slots; s++) {
        const [n, p] = [Math.floor(s / K), positions[s]]
        for (let d = 0; d < D; d++) {
          out[n * D + d] += weights[s] * y[p * D + d]
          dy[p * D + d] = weights[s] * dout[n * D + d]
          dweights[s] += dout[n * D + d] * y[p * D + d]
        }
      }
      const inputs = [
        { data: y, shape: [slots, D] },
        { data: weights, shape: [N, K] },
        { data: order, shape: [slots], dtype: 'i32' as const },
        { data: positions, shape: [slots], dtype: 'i32' as const },
      ]
      const spec = (...shape: number[]) => ({ shape, dtype: 'f32' as const })
      const bits: unknown[] = []
      for (const threads of [1, 2]) {
        const backend = await testBackend({ isa, threads })
        const [got] = await runOp(backend, 'combineTokens', inputs, {}, [spec(N, D)])
        expect(worstError(got, out)).toBeLessThan(1e-6)
        const back = [...inputs, { data: dout, shape: [N, D] }]
        const grads = await runOp(backend, 'combineTokensBackward', back, {}, [spec(slots, D), spec(N, K)])
        expect(worstError(grads[0], dy)).toBeLessThan(1e-6)
        expect(worstError(grads[1], dweights)).toBeLessThan(1e-6)
        bits.push([got, ...grads])
        backend.dispose()
      }
      expect(bits[1]).toEqual(bits[0])
    })
  },
)
