import { Random } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { hopperFp8Bits, keepFp8Bits, onDevice, testBackend, unavailable, wgmmaVariants } from '../../test-backend.ts'

/** Returns integers up to 8 in tiles with different scales: nothing is rounded, and sums are exact, even with the 14 bits that Hopper keeps. */
function numbers(size: number, seed: number): Float32Array {
  return new Random(seed)
    .normal(size)
    .map((v, i) => Math.max(-8, Math.min(8, Math.round(v * 3))) * 2 ** (Math.floor(i / 200) % 3))
}

const f32 = (...shape: number[]) => ({ shape, dtype: 'f32' as const })

/** Multiplies a [m, k] with the transpose of b [n, k], with sums in f64. */
function product(
  m: number,
  n: number,
  k: number,
  a: (i: number, t: number) => number,
  b: (j: number, t: number) => number,
) {
  const c = new Float32Array(m * n)
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let sum = 0
      for (let t = 0; t < k; t++) sum += a(i, t) * b(j, t)
      c[i * n + j] = sum
    }
  }
  return c
}
/** Returns the first differences, because a failed `toEqual` of whole matrices takes minutes to print. */
function differences(found: ArrayLike<number>, expected: Float32Array): string[] {
  const wrong: string[] = []
  for (let i = 0; i < expected.length && wrong.length < 5; i++) {
    if (found[i] !== expected[i]) wrong.push(`[${i}] ${found[i]}, expected ${expected[i]}`)
  }
  return wrong
}

describe.skipIf(unavailable).each(wgmmaVariants)('fp8, wgmma %s', wgmma => {
  beforeEach(() => keepFp8Bits(hopperFp8Bits))
  afterEach(() => keepFp8Bits(0))

  // More steps than stages, several tiles, partial ones, split-K. The large case has only one layout, because layouts only differ in how operands are quantized.
  test.each([
    { m: 300, n: 140, k: 1100 },
    { m: 1, n: 1, k: 1 },
    { m: 129, n: 257, k: 129 },
    { m: 40, n: 24, k: 2100 },
  ])('dense products of $m x $n x $k are exact', async ({ m, n, k }) => {
    const [a, b] = [numbers(m * k, 1), numbers(n * k, 2)]
    for (const transposeA of m === 300 ? [false] : [false, true]) {
      for (const transposeB of m === 300 ? [true] : [false, true]) {
        const backend = await testBackend({ wgmma })
        const inputs = [
          { data: a, shape: transposeA ? [k, m] : [m, k] },
          { data: b, shape: transposeB ? [n, k] : [k, n] },
        ]
        const attrs = { transposeA, transposeB, precision: 'fp8' } as const
        const [c] = await runOp(backend, 'matmul', inputs, attrs, [f32(m, n)])
        backend.dispose()
        const left = (i: number, t: number) => a[transposeA ? t * m + i : i * k + t]
        const right = (j: number, t: number) => b[transposeB ? j * k + t : t * n + j]
        expect(differences(c, product(m, n, k, left, right))).toEqual([])
      }
    }
  })

  test.skipIf(onDevice || !wgmma).each([
    [0, 257, 1, 65_537 + 512],
    [hopperFp8Bits, 257, 1, 65_536 + 512],
    [hopperFp8Bits, 257, 8, 65_600 + 512],
    [hopperFp8Bits, -257, -1, -65_536 - 512],
  ])('sums of %i bits (0: f32) of products of %i and %i give %i', async (bits, large, small, expected) => {
    keepFp8Bits(bits)
    const backend = await testBackend({ wgmma })
    // 257 is rounded to 256, which is then squared; small numbers with this scale are exact.
    const a = Float32Array.of(large, small, 2 * Math.sign(large))
    const b = Float32Array.of(Math.abs(large), Math.abs(small), 256)
    const inputs = [a, b].map(data => ({ data, shape: [1, 3] }))
    const attrs = { transposeA: false, transposeB: true, precision: 'fp8' } as const
    const [c] = await runOp(backend, 'matmul', inputs, attrs, [f32(1, 1)])
    backend.dispose()
    expect(c[0]).toBe(expected)
  })

  const [experts, n, k] = [5, 150, 140]
  const offsets = [0, 0, 1, 200, 200, 331]
  const rows = 340
  const at = { data: offsets, shape: [experts + 1], dtype: 'i32' as const }

  test.each([true, false])('products per expert are exact, transposed: %s', async transposeW => {
    const [x, weight] = [numbers(rows * k, 3), numbers(experts * n * k, 4)]
    const backend = await testBackend({ wgmma })
    const inputs = [
      { data: x, shape: [rows, k] },
      { data: weight, shape: transposeW ? [experts, n, k] : [experts, k, n] },
      at,
    ]
    const [y] = await runOp(backend, 'groupedMatmul', inputs, { transposeW, precision: 'fp8' }, [f32(rows, n)])
    backend.dispose()
    const expected = new Float32Array(rows * n)
    for (let e = 0; e < experts; e++) {
      const [from, size] = [offsets[e], offsets[e + 1] - offsets[e]]
      const own = weight.subarray(e * n * k, (e + 1) * n * k)
      const right = (j: number, t: number) => own[transposeW ? j * k + t : t * n + j]
      expected.set(
        product(size, n, k, (i, t) => x[(from + i) * k + t], right),
        from * n,
      )
    }
    expect(differences(y, expected)).toEqual([])
  })

  test("gradients of the experts' weights are exact", async () => {
    const [x, dy] = [numbers(rows * k, 5), numbers(rows * n, 6)]
    const backend = await testBackend({ wgmma })
    const inputs = [{ data: x, shape: [rows, k] }, { data: dy, shape: [rows, n] }, at]
    const [dweight] = await runOp(backend, 'groupedMatmulWeightGrad', inputs, { precision: 'fp8' }, [
      f32(experts, n, k),
    ])
    backend.dispose()
    const expected = new Float32Array(experts * n * k)
    for (let e = 0; e < experts; e++) {
      const [from, size] = [offsets[e], offsets[e + 1] - offsets[e]]
      const [left, right] = [
        (i: number, t: number) => dy[(from + t) * n + i],
        (j: number, t: number) => x[(from + t) * k + j],
      ]
      expected.set(product(n, k, size, left, right), e * n * k)
    }
    expect(differences(dweight, expected)).toEqual([])
  })
})
