import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'

// F features are prepended.
const shapes: ReadonlyArray<Record<'B' | 'T' | 'H' | 'D' | 'R', number> & { readonly F?: number }> = [
  { B: 2, T: 5, H: 3, D: 16, R: 16 },
  { B: 1, T: 33, H: 8, D: 48, R: 16 },
  { B: 3, T: 2, H: 1, D: 7, R: 2 },
  { B: 1, T: 3, H: 2, D: 700, R: 600 },
  { B: 2, T: 100, H: 2, D: 64, R: 64 },
  { B: 1, T: 0, H: 4, D: 8, R: 8 },
  { B: 1, T: 4, H: 2, D: 5, R: 0 },
  { B: 1, T: 9, H: 2, D: 40, R: 38 },
  { B: 1, T: 1, H: 16, D: 192, R: 64, F: 512 },
  { B: 2, T: 3, H: 1, D: 576, R: 64, F: 512 },
  { B: 2, T: 5, H: 3, D: 22, R: 8, F: 7 },
  { B: 1, T: 2, H: 2, D: 700, R: 600, F: 0 },
  { B: 1, T: 4, H: 2, D: 5, R: 0, F: 3 },
]
const variants = [true, false].flatMap(interleaved => [true, false].map(perBatch => ({ interleaved, perBatch })))

describe.each(await availableIsas())('rope on %s matches f64 loops, with equal bits on 1 and 2 threads', isa => {
  test.each(shapes)('%j', async ({ B, T, H, D, R, F }) => {
    const random = new Random(1)
    const x = random.normal(B * T * H * D)
    const front = F === undefined ? undefined : { data: random.normal(B * T * H * F), shape: [B, T, H, F] }
    const first = F ?? D - R
    const shape = [B, T, H, first + R]
    const half = R / 2
    for (const { interleaved, perBatch } of variants) {
      const tableShape = perBatch ? [B, T, half] : [T, half]
      const angles = random.normal((perBatch ? B : 1) * T * half)
      const [cos, sin] = [angles.map(Math.cos), angles.map(Math.sin)]
      for (const inverse of [false, true]) {
        const y = new Float64Array(B * T * H * (first + R))
        for (let position = 0; position < B * T * H; position++) {
          const row = Math.floor(position / H) % (perBatch ? B * T : T)
          const to = position * (first + R)
          for (let i = 0; i < first; i++) y[to + i] = front ? front.data[position * first + i] : x[position * D + i]
          const from = position * D + D - R
          for (let i = 0; i < half; i++) {
            const [a, b] = interleaved ? [2 * i, 2 * i + 1] : [i, i + half]
            const [p, q] = [x[from + a], x[from + b]]
            const c = cos[row * half + i]
            const s = inverse ? -sin[row * half + i] : sin[row * half + i]
            y[to + first + a] = p * c - q * s
            y[to + first + b] = q * c + p * s
          }
        }
        const inputs = [
          { data: x, shape: [B, T, H, D] },
          { data: cos, shape: tableShape },
          { data: sin, shape: tableShape },
          ...(front ? [front] : []),
        ]
        const bits: unknown[] = []
        for (const threads of [1, 2]) {
          const backend = await testBackend({ isa, threads })
          const [got] = await runOp(backend, 'rope', inputs, { interleaved, inverse }, [{ shape, dtype: 'f32' }])
          expect(worstError(got, y)).toBeLessThan(3e-7)
          bits.push(got)
          backend.dispose()
        }
        expect(bits[1]).toEqual(bits[0])
      }
    }
  })
})
