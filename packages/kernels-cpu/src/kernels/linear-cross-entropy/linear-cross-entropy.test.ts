import type { WidePrecision } from '@moe/core'
import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'

const precisions: readonly WidePrecision[] = ['f32', 'bf16']
const ignoreIndex = -100

interface Case {
  readonly rows: number
  readonly classes: number
  readonly dim: number
  /** Every `skip`-th row is ignored; with 0, none is. */
  readonly skip: number
}

// Several blocks of rows and of classes, with partial blocks at the end of each.
const cases: readonly Case[] = [
  { rows: 1, classes: 1, dim: 1, skip: 0 },
  { rows: 7, classes: 50, dim: 9, skip: 0 },
  { rows: 7, classes: 50, dim: 9, skip: 2 },
  { rows: 150, classes: 1100, dim: 20, skip: 0 },
  { rows: 130, classes: 70, dim: 800, skip: 4 },
  { rows: 3, classes: 5, dim: 4, skip: 1 },
  { rows: 0, classes: 5, dim: 4, skip: 0 },
]

const bits = new Float32Array(1)
const word = new Uint32Array(bits.buffer)

function toBf16(x: number): number {
  bits[0] = x
  word[0] = (word[0] + 0x7fff + ((word[0] >>> 16) & 1)) & 0xffff0000
  return bits[0]
}

function data({ rows, classes, dim, skip }: Case) {
  const random = new Random(rows + classes)
  const x = Float32Array.from(random.normal(rows * dim))
  const weight = Float32Array.from(random.normal(classes * dim), v => (v * 3) / Math.sqrt(dim))
  const ignored = [ignoreIndex, -1, classes]
  const targets = Array.from({ length: rows }, (_, i) =>
    skip > 0 && i % skip === skip - 1 ? ignored[i % 3] : (i * 11) % classes,
  )
  return { x, weight, targets, dloss: Float32Array.from(random.normal(rows)) }
}

type Data = ReturnType<typeof data>

async function run(c: Case, { x, weight, targets, dloss }: Data, precision: WidePrecision, options: object) {
  const backend = await testBackend(options)
  const attrs = { ignoreIndex, precision }
  const perRow = { shape: [c.rows], dtype: 'f32' as const }
  const operands = [
    { data: x, shape: [c.rows, c.dim] },
    { data: weight, shape: [c.classes, c.dim] },
    { data: targets, shape: [c.rows], dtype: 'i32' as const },
  ]
  const [loss, lse] = await runOp(backend, 'linearCrossEntropy', operands, attrs, [perRow, perRow])
  const rest = [
    { data: lse, shape: [c.rows] },
    { data: dloss, shape: [c.rows] },
  ]
  const [dx, dweight] = await runOp(backend, 'linearCrossEntropyBackward', [...operands, ...rest], attrs, [
    { shape: [c.rows, c.dim], dtype: 'f32' },
    { shape: [c.classes, c.dim], dtype: 'f32' },
  ])
  const rounded = precision === 'bf16' && backend.bf16Matmul
  backend.dispose()
  return { loss, lse, dx, dweight, rounded }
}

/** Computes the expected results in f64: logits from rounded operands if `rounded`, gradients without rounding of dlogits. */
function exact({ rows, classes, dim }: Case, { x, weight, targets, dloss }: Data, rounded: boolean) {
  const [a, w] = rounded ? [x.map(toBf16), weight.map(toBf16)] : [x, weight]
  const result = {
    loss: new Float64Array(rows),
    lse: new Float64Array(rows),
    dx: new Float64Array(rows * dim),
    dweight: new Float64Array(classes * dim),
  }
  for (let i = 0; i < rows; i++) {
    const logits = Array.from({ length: classes }, (_, j) => {
      let sum = 0
      for (let t = 0; t < dim; t++) sum += a[i * dim + t] * w[j * dim + t]
      return sum
    })
    const max = Math.max(...logits)
    const lse = max + Math.log(logits.reduce((sum, v) => sum + Math.exp(v - max), 0))
    result.lse[i] = lse
    if (targets[i] < 0 || targets[i] >= classes) continue
    result.loss[i] = lse - logits[targets[i]]
    logits.forEach((v, j) => {
      const d = (Math.exp(v - lse) - (j === targets[i] ? 1 : 0)) * dloss[i]
      for (let t = 0; t < dim; t++) {
        result.dx[i * dim + t] += d * w[j * dim + t]
        result.dweight[j * dim + t] += d * a[i * dim + t]
      }
    })
  }
  return result
}

const largest = (x: ArrayLike<number>) => Array.from(x).reduce((a, b) => Math.max(a, Math.abs(b)), 0)

function distance(x: ArrayLike<number>, y: ArrayLike<number>): number {
  return Array.from(x).reduce((worst, v, i) => Math.max(worst, Math.abs(v - y[i])), 0)
}

describe.each(await availableIsas())('linear cross-entropy on %s', isa => {
  test.each(precisions)('loss, log-sum-exp and both gradients are correct in %s', async precision => {
    for (const c of cases) {
      const d = data(c)
      const actual = await run(c, d, precision, { isa })
      const expected = exact(c, d, actual.rounded)
      expect(distance(actual.lse, expected.lse), JSON.stringify(c)).toBeLessThan(2e-5)
      expect(distance(actual.loss, expected.loss), JSON.stringify(c)).toBeLessThan(2e-5)
      // dlogits are rounded to bf16 before they are multiplied.
      const tolerance = actual.rounded ? 5e-3 : 1e-5
      expect(distance(actual.dx, expected.dx), JSON.stringify(c)).toBeLessThanOrEqual(tolerance * largest(expected.dx))
      expect(distance(actual.dweight, expected.dweight), JSON.stringify(c)).toBeLessThanOrEqual(
        tolerance * largest(expected.dweight),
      )
      d.targets.forEach((target, i) => {
        if (target >= 0 && target < c.classes) return
        expect(actual.loss[i]).toBe(0)
        expect(largest(actual.dx.slice(i * c.dim, (i + 1) * c.dim))).toBe(0)
      })
    }
  })

  test.each(precisions)('results are bitwise equal in every run and with 1, 2 and 3 threads in %s', async precision => {
    const c = { rows: 500, classes: 1500, dim: 48, skip: 9 }
    const d = data(c)
    const one = await run(c, d, precision, { isa, threads: 1 })
    for (const threads of [2, 2, 3]) expect(await run(c, d, precision, { isa, threads })).toEqual(one)
  })
})

test('gradients of many rows and classes, in several blocks of dlogits, are correct', async () => {
  // More than 4096 counted rows and more than 512 classes.
  const c = { rows: 4500, classes: 1100, dim: 8, skip: 0 }
  const d = data(c)
  const actual = await run(c, d, 'f32', {})
  const expected = exact(c, d, false)
  expect(distance(actual.dweight, expected.dweight)).toBeLessThanOrEqual(1e-5 * largest(expected.dweight))
  expect(distance(actual.dx, expected.dx)).toBeLessThanOrEqual(1e-5 * largest(expected.dx))
})
