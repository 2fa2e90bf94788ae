import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'

const spec = (...shape: number[]) => ({ shape, dtype: 'f32' as const })

describe.each(await availableIsas())('rmsNorm on %s matches f64 loops, with equal bits on 1 and 2 threads', isa => {
  test.each([
    [1, 1],
    [2, 3],
    [5, 16],
    [77, 130],
    [2048, 64],
    [3, 4099],
    [0, 8],
  ])('%i rows of %i', async (rows, length) => {
    const random = new Random(rows + length)
    const eps = 1e-5
    const x = random.normal(rows * length)
    const dy = random.normal(rows * length)
    const weight = random.normal(length)
    const y = new Float64Array(x.length)
    const dx = new Float64Array(x.length)
    const dweight = new Float64Array(length)
    const rstd = new Float64Array(rows)
    for (let row = 0; row < rows; row++) {
      const at = row * length
      let squares = 0
      for (let i = 0; i < length; i++) squares += x[at + i] ** 2
      const r = 1 / Math.sqrt(squares / length + eps)
      rstd[row] = r
      let dot = 0
      for (let i = 0; i < length; i++) {
        y[at + i] = x[at + i] * r * weight[i]
        dweight[i] += dy[at + i] * x[at + i] * r
        dot += dy[at + i] * weight[i] * x[at + i] * r
      }
      for (let i = 0; i < length; i++) dx[at + i] = r * (dy[at + i] * weight[i] - (x[at + i] * r * dot) / length)
    }
    const shape = [rows, length]
    const inputs = [
      { data: x, shape },
      { data: weight, shape: [length] },
    ]
    const bits: unknown[] = []
    for (const threads of [1, 2]) {
      const backend = await testBackend({ isa, threads })
      const forward = await runOp(backend, 'rmsNorm', inputs, { eps }, [spec(rows, length), spec(rows)])
      expect(worstError(forward[0], y)).toBeLessThan(1e-6)
      expect(worstError(forward[1], rstd)).toBeLessThan(1e-6)
      const saved = [...inputs, { data: forward[1], shape: [rows] }, { data: dy, shape }]
      const backward = await runOp(backend, 'rmsNormBackward', saved, {}, [spec(rows, length), spec(length)])
      expect(worstError(backward[0], dx)).toBeLessThan(3e-6)
      expect(worstError(backward[1], dweight)).toBeLessThan(3e-6)
      bits.push([...forward, ...backward])
      backend.dispose()
    }
    expect(bits[1]).toEqual(bits[0])
  })
})
