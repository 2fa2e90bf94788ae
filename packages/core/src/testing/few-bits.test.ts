import { expect, test } from 'vitest'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { fp8ErrorBounds } from './few-bits.ts'
import { runOp } from './run-op.ts'

const exponentOf = (x: number) => Math.floor(Math.log2(x))

/**
 * Computes a sum like Hopper, in units of the last bit that is kept: 32 products at a time, and a separate sum for each 128.
 */
function sumInBits(bits: number, x: readonly number[], y: readonly number[]): number {
  let all = 0
  for (let tile = 0; tile < x.length; tile += 128) {
    let sum = 0
    for (let from = tile; from < Math.min(tile + 128, x.length); from += 32) {
      const terms = [sum, ...x.slice(from, from + 32).map((v, t) => v * y[from + t])]
      const largest = Math.max(...terms.map(Math.abs))
      if (largest === 0) continue
      const bit = 2 ** (exponentOf(largest) + 1 - bits)
      sum = terms.reduce((total, term) => total + Math.trunc(term / bit), 0) * bit
      if (sum === 0) continue
      const last = 2 ** (exponentOf(Math.abs(sum)) + 1 - bits)
      sum = Math.trunc(sum / last) * last
    }
    all += sum
  }
  return all
}

/** Returns f8e4m3 numbers whose tiles have the scale 1, because they contain 448. */
function codes(random: Random, rows: number, k: number): number[] {
  const numbers = [...random.normal(rows * k)].map(x => {
    const step = 2 ** (exponentOf(Math.abs(x) * 64 + 1e-3) - 3)
    return Math.max(-448, Math.min(448, Math.round((x * 64) / step) * step))
  })
  return numbers.map((x, i) => ((i % k) % 128 === 7 ? 448 : x))
}

/** Returns the errors of sums with that many bits, relative to the bounds for 14 bits. */
async function ratios(bits: number, k: number): Promise<number[]> {
  const [m, n] = [24, 24]
  const random = new Random(k)
  const [a, b] = [codes(random, m, k), codes(random, n, k)]
  const inputs = [
    { data: a, shape: [m, k] },
    { data: b, shape: [n, k] },
  ]
  const attrs = { transposeA: false, transposeB: true, precision: 'fp8' } as const
  const multiply = async (backend: ReturnType<typeof referenceBackend>) =>
    (await runOp(backend, 'matmul', inputs, attrs, [{ shape: [m, n], dtype: 'f32' }]))[0]
  const [exact, bounds] = [await multiply(referenceBackend()), await multiply(fp8ErrorBounds(14))]
  return Array.from(bounds, (bound, at) => {
    const [i, j] = [Math.floor(at / n), at % n]
    const found = sumInBits(bits, a.slice(i * k, (i + 1) * k), b.slice(j * k, (j + 1) * k))
    return Math.abs(found - exact[at]) / bound
  })
}

test.each([1, 33, 128, 300])('errors of sums of %i products in 14 bits are within the bounds', async k => {
  const found = (await ratios(14, k)).filter(ratio => !Number.isNaN(ratio))
  expect(Math.max(0, ...found)).toBeLessThanOrEqual(1)
  // The bounds are not much too wide.
  if (k > 1) expect(Math.max(...found)).toBeGreaterThan(0.2)
})

test('errors of sums of products in 11 bits exceed the bounds for 14 bits', async () => {
  expect(Math.max(...(await ratios(11, 128)))).toBeGreaterThan(1)
})
