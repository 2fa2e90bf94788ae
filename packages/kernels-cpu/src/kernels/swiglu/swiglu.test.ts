import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'

describe.each(await availableIsas())('swiglu on %s matches f64 loops, with equal bits on 1 and 2 threads', isa => {
  test.each([0, 1, 15, 16, 1003, 70_001])('%i elements', async n => {
    const random = new Random(n)
    const [gate, up, dy] = [random.normal(n).map(v => v * 5), random.normal(n), random.normal(n)]
    const sigmoid = (v: number) => 1 / (1 + Math.exp(-v))
    const y = Float64Array.from(gate, (g, i) => g * sigmoid(g) * up[i])
    const dgate = Float64Array.from(gate, (g, i) => dy[i] * up[i] * sigmoid(g) * (1 + g * (1 - sigmoid(g))))
    const dup = Float64Array.from(gate, (g, i) => dy[i] * g * sigmoid(g))
    const shape = [n]
    const spec = { shape, dtype: 'f32' as const }
    const [g, u, d] = [gate, up, dy].map(data => ({ data, shape }))
    const bits: unknown[] = []
    for (const threads of [1, 2]) {
      const backend = await testBackend({ isa, threads })
      const forward = await runOp(backend, 'swiglu', [g, u], {}, [spec])
      const backward = await runOp(backend, 'swigluBackward', [g, u, d], {}, [spec, spec])
      for (const [got, want] of [
        [forward[0], y],
        [backward[0], dgate],
        [backward[1], dup],
      ]) {
        expect(worstError(got, want)).toBeLessThan(1e-6)
      }
      bits.push([...forward, ...backward])
      backend.dispose()
    }
    expect(bits[1]).toEqual(bits[0])
  })
})
