import { Random, type WidePrecision } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { bf16Isas } from '../../load.ts'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'

interface Size {
  readonly name: string
  readonly sizes: readonly [B: number, T: number, J: number, D: number, S: number]
  /** The number of keys that query t of sequence b sees. Default: all. */
  readonly limit?: (b: number, t: number) => number
}

const cases: readonly Size[] = [
  { name: 'small', sizes: [2, 3, 5, 7, 9] },
  { name: 'heads of V3.2, one query, more than a block of keys', sizes: [1, 1, 64, 128, 1100] },
  {
    name: 'heads of V3.2, several blocks of queries',
    sizes: [2, 5, 64, 128, 530],
    limit: (b, t) => 400 + 90 * b + 7 * t,
  },
  { name: 'one head, fewer rows than a panel', sizes: [1, 3, 1, 33, 65] },
  { name: 'more heads than a block has rows', sizes: [1, 3, 200, 16, 40] },
  { name: 'causal limits', sizes: [1, 150, 4, 24, 620], limit: (_, t) => 471 + t },
  // The gradients of 4,096 products by 512 keys are stored at once.
  { name: 'several blocks in the backward pass', sizes: [1, 130, 32, 4, 530], limit: (_, t) => (t < 128 ? 500 : 530) },
  { name: 'limits out of range', sizes: [2, 3, 6, 10, 33], limit: (b, t) => [-3, 0, 99, 33, 1, 20][3 * b + t] },
  { name: 'no keys', sizes: [1, 2, 3, 4, 0] },
  { name: 'no heads', sizes: [1, 2, 0, 4, 5] },
]

function plain({ sizes: [B, T, J, D, S], limit = () => S }: Size, [q, w, k, d]: readonly Float32Array[]) {
  const scores = new Float64Array(B * T * S).fill(Number.NEGATIVE_INFINITY)
  const [dq, dw, dk] = [q, w, k].map(x => new Float64Array(x.length))
  for (let row = 0; row < B * T; row++) {
    const b = Math.floor(row / T)
    for (let s = 0; s < Math.min(S, limit(b, row % T)); s++) {
      let score = 0
      for (let j = 0; j < J; j++) {
        const [from, key] = [(row * J + j) * D, (b * S + s) * D]
        let x = 0
        for (let i = 0; i < D; i++) x += q[from + i] * k[key + i]
        if (x <= 0) continue
        const [weight, slope] = [w[row * J + j], d[row * S + s]]
        score += weight * x
        dw[row * J + j] += slope * x
        for (let i = 0; i < D; i++) {
          dq[from + i] += slope * weight * k[key + i]
          dk[key + i] += slope * weight * q[from + i]
        }
      }
      scores[row * S + s] = score
    }
  }
  return [scores, dq, dw, dk]
}

describe.each(await availableIsas())('indexScores on %s', isa => {
  test.each(cases)('match f64 loops, with equal bits on 1 and 2 threads: $name', async size => {
    const { sizes, limit } = size
    const [B, T, J, D, S] = sizes
    const random = new Random(D)
    const shapes = [
      [B, T, J, D],
      [B, T, J],
      [B, S, D],
      [B, T, S],
    ]
    // Queries and keys are multiples of 1/8: their products are exact in bf16, too, so that none changes its sign.
    const data = shapes.map((shape, i) => {
      const values = random.normal(shape.reduce((a, b) => a * b))
      return i === 0 || i === 2 ? values.map(x => Math.round(8 * x) / 8) : values
    })
    const inputs = data.map((values, i) => ({ data: values, shape: shapes[i] }))
    const limits = Int32Array.from({ length: B * T }, (_, row) => limit?.(Math.floor(row / T), row % T) ?? 0)
    const seen = limit ? [{ data: limits, shape: [B, T], dtype: 'i32' as const }] : []
    // What no query sees is not read.
    if (limit) {
      for (let b = 0; b < B; b++) {
        const most = Math.max(0, ...limits.subarray(b * T, (b + 1) * T))
        if (most < S) data[2].fill(Number.NaN, (b * S + most) * D, (b + 1) * S * D)
      }
    }
    const specs = shapes.map(shape => ({ shape, dtype: 'f32' as const }))
    const expected = plain(size, data)
    for (const precision of ['f32', 'bf16'] as const satisfies WidePrecision[]) {
      const bits: unknown[] = []
      for (const threads of [1, 2]) {
        const backend = await testBackend({ isa, threads })
        const [q, w, k, d] = inputs
        const forward = await runOp(backend, 'indexScores', [q, w, k, ...seen], { precision }, [specs[3]])
        const backward = await runOp(backend, 'indexScoresBackward', [q, w, k, d, ...seen], { precision }, [
          specs[0],
          specs[1],
          specs[2],
        ])
        const isRounded = precision === 'bf16' && bf16Isas.has(isa)
        for (const [i, values] of [...forward, ...backward].entries()) {
          expect(worstError(values, expected[i]), `${precision}: ${i}`).toBeLessThan(isRounded ? 2e-2 : 3e-6)
        }
        bits.push([...forward, ...backward])
        backend.dispose()
      }
      expect(bits[1]).toEqual(bits[0])
    }
  })
})

test('a NaN product makes the score of its query and key NaN', async () => {
  const backend = await testBackend()
  const q = { data: Float32Array.of(Number.NaN, 1, 1, 2), shape: [1, 2, 2, 1] }
  const w = { data: Float32Array.of(1, 1, 1, 1), shape: [1, 2, 2] }
  const k = { data: Float32Array.of(1, -1, Number.NaN), shape: [1, 3, 1] }
  const spec = { shape: [1, 2, 3], dtype: 'f32' as const }
  const [scores] = await runOp(backend, 'indexScores', [q, w, k], { precision: 'f32' }, [spec])
  expect(Array.from(scores)).toEqual([Number.NaN, Number.NaN, Number.NaN, 3, 0, Number.NaN])
  backend.dispose()
})
