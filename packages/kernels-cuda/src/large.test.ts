/**
 * @file Ops at the sizes of real models, with many large tiles and offsets beyond 2^31 bytes: compares a few elements of each result with sums in f64. The
 * emulator runs the same cases at smaller sizes.
 */
import { type HostArray, Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { integers, onCuda, output } from './test-against-cpu.ts'
import { onDevice, productVariants, unavailable } from './test-backend.ts'

// Tiles are chosen as in normal use.
if (onDevice) delete process.env['MOE_CUDA_MULTIPROCESSORS']

const full = (size: number, small: number) => (onDevice ? size : small)

/** Returns numbers with few bits, repeated with a period that divides no row length. */
function numbers(seed: number, ...shape: number[]) {
  const data = new Float32Array(shape.reduce((a, b) => a * b, 1))
  const period = Math.min(data.length, 2 ** 20 + 7)
  data.set(new Random(seed).uniform(period).map(x => Math.round(64 * x - 32) / 32))
  for (let done = period; done < data.length; done *= 2) data.copyWithin(done, 0, done)
  return { data, shape }
}

/** Returns the first index, the last, and some in between. */
function some(n: number, count = 6): number[] {
  const random = new Random(n)
  const between = Array.from({ length: count }, () => random.integer(n))
  return [...new Set([0, n - 1, Math.min(n - 1, 127), Math.min(n - 1, 128), ...between])]
}

function sum(n: number, term: (i: number) => number): number {
  let total = 0
  for (let i = 0; i < n; i++) total += term(i)
  return total
}

/** Collects sampled elements, to report all wrong ones at once. */
class Samples {
  readonly #wrong: string[] = []
  #count = 0

  add(name: string, actual: number, expected: number, tolerance: number): void {
    this.#count++
    if (!(Math.abs(actual - expected) <= tolerance)) this.#wrong.push(`${name}: ${actual}, expected ${expected}`)
  }

  expectAllRight(): void {
    const shown = this.#wrong.slice(0, 12).join('\n')
    expect(this.#wrong.length, `${this.#wrong.length} of ${this.#count} are wrong\n${shown}`).toBe(0)
  }
}

describe.skipIf(unavailable).each(productVariants)('large, $precision, wgmma $wgmma', ({ precision, wgmma }) => {
  const options = { wgmma, guarded: false }
  const seconds = 120_000

  test.each([
    {
      name: 'forward',
      transposeA: false,
      transposeB: true,
      m: full(4096, 300),
      n: full(24576, 520),
      k: full(1536, 96),
    },
    {
      name: 'gradient of x',
      transposeA: false,
      transposeB: false,
      m: full(4096, 140),
      n: full(7168, 300),
      k: full(16384, 200),
    },
    {
      name: 'gradient of the weight',
      transposeA: true,
      transposeB: false,
      m: full(18432, 300),
      n: full(7168, 270),
      k: full(4096, 70),
    },
  ])(
    'matmul, $name',
    async ({ transposeA, transposeB, m, n, k }) => {
      const a = numbers(1, ...(transposeA ? [k, m] : [m, k]))
      const b = numbers(2, ...(transposeB ? [n, k] : [k, n]))
      const [c] = await onCuda('matmul', [a, b], { transposeA, transposeB, precision }, [output(m, n)], options)
      const samples = new Samples()
      for (const i of some(m, 20))
        for (const j of some(n, 20)) {
          const want = sum(
            k,
            p => a.data[transposeA ? p * m + i : i * k + p] * b.data[transposeB ? j * k + p : p * n + j],
          )
          samples.add(`[${i}, ${j}]`, Number(c[i * n + j]), want, 1e-3)
        }
      samples.expectAllRight()
    },
    seconds,
  )

  test(
    'products per expert, and the gradients of their weights',
    async () => {
      const [experts, k, n] = [full(32, 5), full(7168, 80), full(2048, 270)]
      const ends = Array.from({ length: experts + 1 }, (_, e) => Math.round((full(32768, 600) * e * e) / experts ** 2))
      const rows = ends[experts]
      const [x, weight, dy] = [numbers(1, rows, k), numbers(2, experts, n, k), numbers(3, rows, n)]
      const attrs = { transposeW: true, precision }
      const [y] = await onCuda('groupedMatmul', [x, weight, integers(...ends)], attrs, [output(rows, n)], options)
      const gradient = [output(experts, n, k)]
      const inputs = [x, dy, integers(...ends)]
      const [dweight] = await onCuda('groupedMatmulWeightGrad', inputs, { precision }, gradient, options)
      const samples = new Samples()
      for (const e of some(experts, 4)) {
        for (const j of some(n)) {
          for (const i of some(ends[e + 1] - ends[e]).filter(i => i >= 0)) {
            const row = ends[e] + i
            const want = sum(k, p => x.data[row * k + p] * weight.data[(e * n + j) * k + p])
            samples.add(`y [${row}, ${j}]`, Number(y[row * n + j]), want, 1e-3)
          }
          for (const p of some(k)) {
            let want = 0
            for (let row = ends[e]; row < ends[e + 1]; row++) want += dy.data[row * n + j] * x.data[row * k + p]
            samples.add(`dweight [${e}, ${j}, ${p}]`, Number(dweight[(e * n + j) * k + p]), want, 1e-3)
          }
        }
      }
      samples.expectAllRight()
    },
    seconds,
  )

  // In f32, not every device has enough shared memory for the widest heads.
  test.each([{ Dk: 192, Dv: 128 }, ...(precision === 'bf16' ? [{ Dk: 256, Dv: 256 }] : [])])(
    'attention, forward and backward, $Dk and $Dv features',
    async ({ Dk, Dv }) => {
      const [T, H] = [full(8192, 200), full(16, 2)]
      const [q, k, v] = [numbers(1, 1, T, H, Dk), numbers(2, 1, T, H, Dk), numbers(3, 1, T, H, Dv)]
      const dout = numbers(4, 1, T, H, Dv)
      // With this scale, few of the many keys have weight; otherwise results would be nearly zero.
      const attrs = { causal: true, scale: 0.75, precision }
      const outputs = [output(1, T, H, Dv), output(1, H, T)]
      const [out, lse] = await onCuda('attention', [q, k, v], attrs, outputs, options)
      const saved = [out, lse].map((data, i) => ({ data: data as Float32Array, shape: outputs[i].shape }))
      const gradients = [q, k, v].map(({ shape }) => output(...shape))
      const [dq, dk, dv] = await onCuda('attentionBackward', [q, k, v, ...saved, dout], attrs, gradients, options)

      const dot = (a: HostArray, i: number, b: HostArray, j: number, h: number, D: number) =>
        sum(D, d => Number(a[(i * H + h) * D + d]) * Number(b[(j * H + h) * D + d]))
      const score = (i: number, j: number, h: number) => attrs.scale * dot(q.data, i, k.data, j, h, Dk)
      /** The probability and the score's gradient of query i and key j, computed from the kernel's lse and output. */
      const pair = (i: number, j: number, h: number) => {
        const p = Math.exp(score(i, j, h) - Number(lse[h * T + i]))
        return { p, ds: p * (dot(dout.data, i, v.data, j, h, Dv) - dot(dout.data, i, out, i, h, Dv)) * attrs.scale }
      }
      const samples = new Samples()
      const tolerance = precision === 'bf16' ? 2e-2 : 1e-4
      const features = (D: number) => [0, 1, 63, 64, D - 1]
      for (const h of [0, H - 1]) {
        for (const i of some(T, 4)) {
          const scores = Array.from({ length: i + 1 }, (_, j) => score(i, j, h))
          const most = Math.max(...scores)
          const want = most + Math.log(sum(i + 1, j => Math.exp(scores[j] - most)))
          samples.add(`lse [${h}, ${i}]`, Number(lse[h * T + i]), want, tolerance)
          const pairs = Array.from({ length: i + 1 }, (_, j) => pair(i, j, h))
          for (const d of features(Dv)) {
            const value = sum(i + 1, j => pairs[j].p * v.data[(j * H + h) * Dv + d])
            samples.add(`out [${i}, ${h}, ${d}]`, Number(out[(i * H + h) * Dv + d]), value, tolerance)
          }
          for (const d of features(Dk)) {
            const value = sum(i + 1, j => pairs[j].ds * k.data[(j * H + h) * Dk + d])
            samples.add(`dq [${i}, ${h}, ${d}]`, Number(dq[(i * H + h) * Dk + d]), value, tolerance)
          }
        }
        for (const j of some(T, 4)) {
          const pairs = Array.from({ length: T - j }, (_, i) => pair(j + i, j, h))
          for (const d of features(Dk)) {
            const value = sum(T - j, i => pairs[i].ds * q.data[((j + i) * H + h) * Dk + d])
            samples.add(`dk [${j}, ${h}, ${d}]`, Number(dk[(j * H + h) * Dk + d]), value, 2 * tolerance)
          }
          for (const d of features(Dv)) {
            const value = sum(T - j, i => pairs[i].p * dout.data[((j + i) * H + h) * Dv + d])
            samples.add(`dv [${j}, ${h}, ${d}]`, Number(dv[(j * H + h) * Dv + d]), value, 2 * tolerance)
          }
        }
      }
      samples.expectAllRight()
    },
    seconds,
  )

  test.each([
    { dtype: 'f32', page: 0 },
    { dtype: 'bf16', page: 0 },
    { dtype: 'f32', page: 64 },
    { dtype: 'bf16', page: 64 },
    { dtype: 'bf16', page: 16 },
  ] as const)(
    'absorbed decoding, cache in $dtype, pages of $page',
    async ({ dtype, page }) => {
      const [B, S, H, C, V] = [full(64, 2), full(4096, 192), full(128, 16), 576, 512]
      const lengths = Array.from({ length: B }, (_, b) => S - ((b * 61) % (S >> 1)))
      const [q, cache] = [numbers(1, B, 1, H, C), numbers(2, B, S, C)]
      const attrs = { scale: 0.4, valueDim: V, precision }
      const pages = B * (page === 0 ? 1 : S / page)
      // The number of pages has only the prime factors 2 and 3.
      const table = Array.from({ length: pages }, (_, i) => (i * 5 + 1) % pages)
      const rowOf = (b: number, j: number) =>
        page === 0 ? b * S + j : table[b * (S / page) + Math.floor(j / page)] * page + (j % page)
      const stored = { ...cache, dtype }
      const inputs =
        page === 0
          ? [q, stored, integers(...lengths)]
          : [
              q,
              { ...stored, shape: [pages, page, C] },
              integers(...lengths),
              { ...integers(...table), shape: [B, S / page] },
            ]
      const [out] = await onCuda('latentAttention', inputs, attrs, [output(B, 1, H, V)], options)
      const samples = new Samples()
      for (const b of some(B, 3)) {
        for (const h of some(H, 2)) {
          const scores = Array.from(
            { length: lengths[b] },
            (_, j) => attrs.scale * sum(C, c => q.data[(b * H + h) * C + c] * cache.data[rowOf(b, j) * C + c]),
          )
          const most = Math.max(...scores)
          const weights = scores.map(s => Math.exp(s - most))
          const total = weights.reduce((a, w) => a + w, 0)
          for (const c of [0, 1, 255, 256, V - 1]) {
            const want = sum(lengths[b], j => weights[j] * cache.data[rowOf(b, j) * C + c]) / total
            samples.add(
              `[${b}, ${h}, ${c}]`,
              Number(out[(b * H + h) * V + c]),
              want,
              precision === 'bf16' ? 2e-2 : 1e-4,
            )
          }
        }
      }
      samples.expectAllRight()
    },
    seconds,
  )

  test(
    'linear cross-entropy',
    async () => {
      const [rows, classes, D] = [full(8192, 150), full(32768, 600), full(1024, 64)]
      const [x, weight] = [numbers(1, rows, D), numbers(2, classes, D)]
      const targets = Array.from({ length: rows }, (_, i) => (i * 7919) % classes)
      const inputs = [x, { ...weight, data: weight.data.map(w => w / 4) }, integers(...targets)]
      const attrs = { ignoreIndex: -100, precision }
      const [loss, lse] = await onCuda('linearCrossEntropy', inputs, attrs, [output(rows), output(rows)], options)
      const dloss = { data: new Float32Array(rows).fill(1), shape: [rows] }
      const saved = { data: lse as Float32Array, shape: [rows] }
      const gradients = [output(rows, D), output(classes, D)]
      const [dx] = await onCuda('linearCrossEntropyBackward', [...inputs, saved, dloss], attrs, gradients, options)
      const samples = new Samples()
      for (const i of some(rows, 3)) {
        const logits = Array.from(
          { length: classes },
          (_, j) => sum(D, d => x.data[i * D + d] * weight.data[j * D + d]) / 4,
        )
        const most = logits.reduce((a, b) => Math.max(a, b))
        const want = most + Math.log(logits.reduce((a, z) => a + Math.exp(z - most), 0))
        samples.add(`lse [${i}]`, Number(lse[i]), want, 1e-3)
        samples.add(`loss [${i}]`, Number(loss[i]), want - logits[targets[i]], 1e-3)
        for (const d of [0, 1, D - 1]) {
          const slope = logits.reduce((a, z, j) => a + Math.exp(z - want) * weight.data[j * D + d], 0)
          const expected = (slope - weight.data[targets[i] * D + d]) / 4
          samples.add(`dx [${i}, ${d}]`, Number(dx[i * D + d]), expected, precision === 'bf16' ? 1e-2 : 1e-4)
        }
      }
      samples.expectAllRight()
    },
    seconds,
  )
})
