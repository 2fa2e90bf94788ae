import type { Precision } from '@moe/core'
import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import type { Isa } from '../../load.ts'
import { availableIsas, highestIsa, runOp, testBackend } from '../../test-backend.ts'

const precisions: readonly Precision[] = ['f32', 'bf16']
const flags = [false, true]

interface Product {
  readonly batch?: number
  readonly m: number
  readonly n: number
  readonly k: number
  readonly transposeA: boolean
  readonly transposeB: boolean
  readonly precision: Precision
}

const bits = new Float32Array(1)
const word = new Uint32Array(bits.buffer)

/** Rounds to the nearest bf16, ties to even. */
function toBf16(x: number): number {
  bits[0] = x
  word[0] = (word[0] + 0x7fff + ((word[0] >>> 16) & 1)) & 0xffff0000
  return bits[0]
}

async function multiply(
  p: Product,
  a: ArrayLike<number>,
  b: ArrayLike<number>,
  options: { isa?: Isa; threads?: number },
) {
  const backend = await testBackend(options)
  const lead = p.batch === undefined ? [] : [p.batch]
  const inputs = [
    { data: a, shape: [...lead, ...(p.transposeA ? [p.k, p.m] : [p.m, p.k])] },
    { data: b, shape: [...lead, ...(p.transposeB ? [p.n, p.k] : [p.k, p.n])] },
  ]
  const attrs = { transposeA: p.transposeA, transposeB: p.transposeB, precision: p.precision }
  const [c] = await runOp(backend, 'matmul', inputs, attrs, [{ shape: [...lead, p.m, p.n], dtype: 'f32' }])
  const rounded = p.precision === 'bf16' && backend.bf16Matmul
  backend.dispose()
  return { c, rounded }
}

function operands({ batch = 1, m, n, k }: Product, seed: number) {
  const random = new Random(seed)
  return { a: Float32Array.from(random.normal(batch * m * k)), b: Float32Array.from(random.normal(batch * k * n)) }
}

/** Returns the largest |c - exact| relative to the sum of the absolute products that make up the element. */
function worstError(p: Product, a: Float32Array, b: Float32Array, c: ArrayLike<number>, rounded: boolean): number {
  const [x, y] = rounded ? [a.map(toBf16), b.map(toBf16)] : [a, b]
  let worst = 0
  for (let s = 0; s < (p.batch ?? 1); s++) {
    for (let i = 0; i < p.m; i++) {
      for (let j = 0; j < p.n; j++) {
        let sum = 0
        let size = 1
        for (let t = 0; t < p.k; t++) {
          const ai = s * p.m * p.k + (p.transposeA ? t * p.m + i : i * p.k + t)
          const bi = s * p.n * p.k + (p.transposeB ? j * p.k + t : t * p.n + j)
          sum += x[ai] * y[bi]
          size += Math.abs(x[ai] * y[bi])
        }
        const error = Math.abs(c[(s * p.m + i) * p.n + j] - sum) / size
        worst = Math.max(error, worst)
      }
    }
  }
  return worst
}

// [m, n, k]: single elements, vector and panel tails on every axis, few rows, several passes over k, several tiles.
const sizes = [
  [1, 1, 1],
  [1, 40, 33],
  [1, 513, 70],
  [2, 31, 1],
  [2, 11, 4500],
  [3, 33, 800],
  [4, 16, 17],
  [5, 1, 129],
  [13, 47, 31],
  [14, 32, 32],
  [15, 64, 2],
  [29, 95, 97],
  [57, 17, 1601],
  [61, 130, 65],
  [113, 600, 5],
  [300, 70, 20],
]

describe.each(await availableIsas())('matmul on %s', isa => {
  test.each(precisions)('matches f64 products in %s', async precision => {
    for (const [index, [m, n, k]] of sizes.entries()) {
      for (const transposeA of flags) {
        for (const transposeB of flags) {
          const p = { m, n, k, transposeA, transposeB, precision }
          const { a, b } = operands(p, index)
          const { c, rounded } = await multiply(p, a, b, { isa })
          expect(worstError(p, a, b, c, rounded), JSON.stringify(p)).toBeLessThan(1e-6)
        }
      }
    }
  })

  test.each(precisions)('matches batched f64 products in %s', async precision => {
    for (const [batch, m, n, k] of [
      [3, 5, 7, 9],
      [2, 70, 33, 34],
      [40, 3, 2, 5],
    ]) {
      for (const transposeA of flags) {
        for (const transposeB of flags) {
          const p = { batch, m, n, k, transposeA, transposeB, precision }
          const { a, b } = operands(p, batch)
          const { c, rounded } = await multiply(p, a, b, { isa })
          expect(worstError(p, a, b, c, rounded), JSON.stringify(p)).toBeLessThan(1e-6)
        }
      }
    }
  })

  test.each(precisions)('results are bitwise equal in every run and with 1, 2 and 3 threads in %s', async precision => {
    for (const [m, n, k] of [
      [300, 700, 500],
      [33, 2000, 900],
      [1, 3000, 400],
      [700, 40, 300],
    ]) {
      for (const transposeB of flags) {
        const p = { m, n, k, transposeA: false, transposeB, precision }
        const { a, b } = operands(p, 1)
        const { c } = await multiply(p, a, b, { isa, threads: 1 })
        for (const threads of [2, 2, 3]) expect((await multiply(p, a, b, { isa, threads })).c).toEqual(c)
      }
    }
  })

  test.each(precisions)('handles sizes of zero in %s', async precision => {
    const p = { m: 3, n: 4, k: 5, transposeA: false, transposeB: true, precision }
    expect([...(await multiply({ ...p, k: 0 }, [], [], { isa })).c]).toEqual(Array(12).fill(0))
    expect((await multiply({ ...p, m: 0 }, [], Array(20).fill(1), { isa })).c.length).toBe(0)
    expect((await multiply({ ...p, n: 0 }, Array(15).fill(1), [], { isa })).c.length).toBe(0)
    expect((await multiply({ ...p, batch: 0 }, [], [], { isa })).c.length).toBe(0)
  })

  test.each(precisions)('NaN and infinity only affect their own rows and columns in %s', async precision => {
    const p = { m: 20, n: 35, k: 40, transposeA: false, transposeB: true, precision }
    const a = new Float32Array(p.m * p.k).fill(1)
    const b = new Float32Array(p.n * p.k).fill(1)
    a[3 * p.k + 39] = Number.NaN
    b[34 * p.k + 1] = Number.POSITIVE_INFINITY
    const { c } = await multiply(p, a, b, { isa })
    for (let i = 0; i < p.m; i++) {
      for (let j = 0; j < p.n; j++) {
        const expected = i === 3 ? Number.NaN : j === 34 ? Number.POSITIVE_INFINITY : 40
        expect(c[i * p.n + j], `${i},${j}`).toBe(expected)
      }
    }
  })
})

// Arm rounds the sum of two products, and its sum with the previous total, to odd: each time by less than a unit in the last place, 2^-23 of the total so far.
// x86 rounds to nearest after every product, with an error of at most half of that.
test.each(await availableIsas())('bf16 sums on %s are accurate to one ulp for every two products', async isa => {
  for (const m of [1, 12, 25]) {
    for (const k of [62, 700, 3001]) {
      const p = { m, n: 9, k, transposeA: false, transposeB: true, precision: 'bf16' } as const
      // Each addition is smaller than the last place of the sum.
      const a = Float32Array.from({ length: m * k }, (_, i) => (i % k === 0 ? 64 : i % 2 === 0 ? 48 * 2 ** -23 : 0))
      for (const numbers of [operands(p, m + k), { a, b: new Float32Array(9 * k).fill(1) }]) {
        const { c, rounded } = await multiply(p, numbers.a, numbers.b, { isa })
        const worst = worstError(p, numbers.a, numbers.b, c, rounded)
        expect(worst, `${m} rows of ${k}`).toBeLessThanOrEqual(2 ** -23 * (k / 2 + 2))
      }
    }
  }
})

test('bf16 rounds to nearest even', async () => {
  const isa = await highestIsa()
  // Ties between adjacent bf16 values (8 bits of significand), down to even and up to even.
  const x = [1 + 2 ** -8, 1 + 3 * 2 ** -8, 1 + 2 ** -8 + 2 ** -20, -(1 + 2 ** -8), 1 + 2 ** -7]
  const p = { m: 5, n: 1, k: 1, transposeA: false, transposeB: true, precision: 'bf16' } as const
  const { c, rounded } = await multiply(p, x, [1], { isa })
  expect([...c]).toEqual(rounded ? [1, 1 + 2 ** -6, 1 + 2 ** -7, -1, 1 + 2 ** -7] : x.map(Math.fround))
})
