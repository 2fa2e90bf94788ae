import type { Precision } from '@moe/core'
import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import type { Isa } from '../../load.ts'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'

const precisions: readonly Precision[] = ['f32', 'bf16']

interface Groups {
  readonly offsets: readonly number[]
  readonly rows: number
  readonly k: number
  readonly n: number
}

const cases: readonly Groups[] = [
  { offsets: [0, 7], rows: 7, k: 5, n: 3 },
  { offsets: [0, 0, 1, 1, 30, 30], rows: 30, k: 33, n: 34 },
  { offsets: [0, 20, 50, 51], rows: 64, k: 40, n: 70 },
  { offsets: [0, 0, 0], rows: 4, k: 8, n: 9 },
  { offsets: [0, 200, 203, 210], rows: 210, k: 17, n: 130 },
  { offsets: [0, 2], rows: 2, k: 0, n: 3 },
]

function data({ offsets, rows, k, n }: Groups) {
  const random = new Random(rows)
  const normal = (size: number) => Float32Array.from(random.normal(size))
  return { x: normal(rows * k), dy: normal(rows * n), weight: normal((offsets.length - 1) * n * k) }
}

/** Rounding is covered by the matrix product's own test; here integers are exact in both precisions. */
const small = (x: Float32Array) => x.map(v => Math.max(-8, Math.min(8, Math.round(v * 3))))

async function forward(
  g: Groups,
  x: Float32Array,
  weight: Float32Array,
  transposeW: boolean,
  precision: Precision,
  options: object,
) {
  const backend = await testBackend(options)
  const experts = g.offsets.length - 1
  const inputs = [
    { data: x, shape: [g.rows, g.k] },
    { data: weight, shape: transposeW ? [experts, g.n, g.k] : [experts, g.k, g.n] },
    { data: g.offsets, shape: [experts + 1], dtype: 'i32' as const },
  ]
  const [y] = await runOp(backend, 'groupedMatmul', inputs, { transposeW, precision }, [
    { shape: [g.rows, g.n], dtype: 'f32' },
  ])
  backend.dispose()
  return y
}

async function weightGrad(
  g: Groups,
  x: Float32Array,
  dy: Float32Array,
  precision: Precision,
  options: { isa?: Isa; threads?: number },
) {
  const backend = await testBackend(options)
  const experts = g.offsets.length - 1
  const inputs = [
    { data: x, shape: [g.rows, g.k] },
    { data: dy, shape: [g.rows, g.n] },
    { data: g.offsets, shape: [experts + 1], dtype: 'i32' as const },
  ]
  const spec = { shape: [experts, g.n, g.k], dtype: 'f32' as const }
  const [dweight] = await runOp(backend, 'groupedMatmulWeightGrad', inputs, { precision }, [spec])
  backend.dispose()
  return dweight
}

describe.each(await availableIsas())('grouped matmul on %s', isa => {
  test.each(precisions)(
    'multiplies the rows of each expert and clears those after the last expert, in %s',
    async precision => {
      for (const g of cases) {
        const { x, weight } = data(g)
        for (const transposeW of [true, false]) {
          const [a, w] = [small(x), small(weight)]
          const expected = new Float32Array(g.rows * g.n)
          for (let e = 0; e + 1 < g.offsets.length; e++) {
            for (let i = g.offsets[e]; i < g.offsets[e + 1]; i++) {
              for (let j = 0; j < g.n; j++) {
                let sum = 0
                for (let t = 0; t < g.k; t++) {
                  sum += a[i * g.k + t] * w[e * g.n * g.k + (transposeW ? j * g.k + t : t * g.n + j)]
                }
                expected[i * g.n + j] = sum
              }
            }
          }
          const y = await forward(g, a, w, transposeW, precision, { isa })
          expect(
            Float32Array.from(y, v => v + 0),
            JSON.stringify(g),
          ).toEqual(expected.map(v => v + 0))
        }
      }
    },
  )

  test.each(precisions)('weight gradients are correct, and zero for experts without rows, in %s', async precision => {
    for (const g of cases) {
      const { x, dy } = data(g)
      const [a, d] = [small(x), small(dy)]
      const expected = new Float32Array((g.offsets.length - 1) * g.n * g.k)
      for (let e = 0; e + 1 < g.offsets.length; e++) {
        for (let i = g.offsets[e]; i < g.offsets[e + 1]; i++) {
          for (let j = 0; j < g.n; j++) {
            for (let t = 0; t < g.k; t++) expected[(e * g.n + j) * g.k + t] += d[i * g.n + j] * a[i * g.k + t]
          }
        }
      }
      const dweight = await weightGrad(g, a, d, precision, { isa })
      expect(
        Float32Array.from(dweight, v => v + 0),
        JSON.stringify(g),
      ).toEqual(expected.map(v => v + 0))
    }
  })

  test.each(precisions)(
    'large weight gradients, written with non-temporal stores, are correct in %s',
    async precision => {
      // More than 2^22 elements. Rows of 1,296 are whole vectors with half a panel at the end; rows of 1,297 are not.
      for (const k of [1296, 1297]) {
        const g: Groups = { offsets: [0, 3, 3, 5], rows: 6, k, n: 1081 }
        const { x, dy } = data(g)
        const [a, d] = [small(x), small(dy)]
        const dweight = await weightGrad(g, a, d, precision, { isa })
        let wrong = 0
        for (let e = 0; e < 3; e++) {
          for (let j = 0; j < g.n; j++) {
            for (let t = 0; t < k; t++) {
              let sum = 0
              for (let i = g.offsets[e]; i < g.offsets[e + 1]; i++) sum += d[i * g.n + j] * a[i * k + t]
              if (dweight[(e * g.n + j) * k + t] !== sum) wrong++
            }
          }
        }
        expect(wrong, `rows of ${k}`).toBe(0)
      }
    },
  )

  test.each(precisions)('results are bitwise equal in every run and with 1, 2 and 3 threads in %s', async precision => {
    const ragged: readonly Groups[] = [
      { offsets: [0, 900, 905, 1000], rows: 1000, k: 200, n: 160 },
      { offsets: Array.from({ length: 41 }, (_, e) => e * 17), rows: 700, k: 96, n: 128 },
    ]
    for (const g of ragged) {
      const { x, dy, weight } = data(g)
      const y = await forward(g, x, weight, true, precision, { isa, threads: 1 })
      const dweight = await weightGrad(g, x, dy, precision, { isa, threads: 1 })
      for (const threads of [2, 2, 3]) {
        expect(await forward(g, x, weight, true, precision, { isa, threads })).toEqual(y)
        expect(await weightGrad(g, x, dy, precision, { isa, threads })).toEqual(dweight)
      }
    }
  })
})

test('an expert gives the same result with and without the other experts', async () => {
  const g = { offsets: [0, 33, 60, 61], rows: 61, k: 70, n: 50 }
  const { x, weight } = data(g)
  const y = await forward(g, x, weight, true, 'bf16', {})
  for (let e = 0; e < 3; e++) {
    const [from, to] = [g.offsets[e], g.offsets[e + 1]]
    const alone = { offsets: [0, to - from], rows: to - from, k: g.k, n: g.n }
    const own = weight.slice(e * g.n * g.k, (e + 1) * g.n * g.k)
    const part = await forward(alone, x.slice(from * g.k, to * g.k), own, true, 'bf16', {})
    expect(y.slice(from * g.n, to * g.n)).toEqual(part)
  }
})

test('gradients larger than the caches are correct, with and without whole vectors', async () => {
  for (const k of [512, 520]) {
    const experts = 17
    const offsets = Array.from({ length: experts + 1 }, (_, e) => Math.max(0, e * 3 - 3))
    const g = { offsets, rows: offsets[experts], k, n: 512 }
    const { x, dy } = data(g)
    const [a, d] = [small(x), small(dy)]
    for (const precision of precisions) {
      const dweight = await weightGrad(g, a, d, precision, { threads: 2 })
      let wrong = 0
      for (let e = 0; e < experts; e++) {
        for (let j = 0; j < g.n; j++) {
          for (let t = 0; t < k; t++) {
            let sum = 0
            for (let i = offsets[e]; i < offsets[e + 1]; i++) sum += d[i * g.n + j] * a[i * k + t]
            if (dweight[(e * g.n + j) * k + t] !== sum) wrong++
          }
        }
      }
      expect(wrong).toBe(0)
    }
  }
})
