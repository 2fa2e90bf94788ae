import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'

const ignoreIndex = -100

interface Case {
  readonly rows: number
  readonly classes: number
  readonly scale: number
}

const cases: readonly Case[] = [
  { rows: 1, classes: 1, scale: 1 },
  { rows: 5, classes: 3, scale: 10 },
  { rows: 37, classes: 100, scale: 1 },
  { rows: 4, classes: 1000, scale: 60 },
  { rows: 300, classes: 129, scale: 3 },
  { rows: 0, classes: 7, scale: 1 },
]

function data({ rows, classes, scale }: Case) {
  const random = new Random(rows + classes)
  const logits = Float32Array.from(random.normal(rows * classes), v => v * scale)
  // Every fifth row is ignored, for each of the possible reasons.
  const ignored = [ignoreIndex, -1, classes, 2 ** 30]
  const targets = Array.from({ length: rows }, (_, i) => (i % 5 === 4 ? ignored[((i / 5) | 0) % 4] : (i * 7) % classes))
  const dloss = Float32Array.from(random.normal(rows))
  return { logits, targets, dloss }
}

async function forward({ rows, classes }: Case, logits: Float32Array, targets: number[], options: object) {
  const backend = await testBackend(options)
  const spec = { shape: [rows], dtype: 'f32' as const }
  const inputs = [
    { data: logits, shape: [rows, classes] },
    { data: targets, shape: [rows], dtype: 'i32' as const },
  ]
  const [loss, lse] = await runOp(backend, 'crossEntropy', inputs, { ignoreIndex }, [spec, spec])
  backend.dispose()
  return { loss, lse }
}

async function backward(
  { rows, classes }: Case,
  logits: Float32Array,
  targets: number[],
  lse: ArrayLike<number>,
  dloss: Float32Array,
  options: object,
) {
  const backend = await testBackend(options)
  const inputs = [
    { data: logits, shape: [rows, classes] },
    { data: targets, shape: [rows], dtype: 'i32' as const },
    { data: lse, shape: [rows] },
    { data: dloss, shape: [rows] },
  ]
  const spec = { shape: [rows, classes], dtype: 'f32' as const }
  const [dlogits] = await runOp(backend, 'crossEntropyBackward', inputs, { ignoreIndex }, [spec])
  backend.dispose()
  return dlogits
}

function exactLse(row: Float32Array): number {
  const max = row.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY)
  return max + Math.log(row.reduce((sum, v) => sum + Math.exp(v - max), 0))
}

describe.each(await availableIsas())('cross-entropy on %s', isa => {
  test('loss, log-sum-exp and gradient are correct', async () => {
    for (const c of cases) {
      const { logits, targets, dloss } = data(c)
      const { loss, lse } = await forward(c, logits, targets, { isa })
      const dlogits = await backward(c, logits, targets, lse, dloss, { isa })
      for (let i = 0; i < c.rows; i++) {
        const row = logits.subarray(i * c.classes, (i + 1) * c.classes)
        const exact = exactLse(row)
        const tolerance = 2e-6 * Math.max(1, ...row.map(Math.abs))
        expect(Math.abs(lse[i] - exact), `lse of row ${i}`).toBeLessThan(tolerance)
        const counted = targets[i] >= 0 && targets[i] < c.classes
        expect(Math.abs(loss[i] - (counted ? exact - row[targets[i]] : 0))).toBeLessThan(counted ? tolerance : 1e-30)
        for (let j = 0; j < c.classes; j++) {
          const expected = counted ? (Math.exp(row[j] - exact) - (j === targets[i] ? 1 : 0)) * dloss[i] : 0
          expect(Math.abs(dlogits[i * c.classes + j] - expected)).toBeLessThanOrEqual(
            counted ? tolerance * 2 * Math.abs(dloss[i]) : 0,
          )
        }
      }
    }
  })

  test('a class with logit -Infinity has probability 0', async () => {
    const c = { rows: 2, classes: 40, scale: 1 }
    const logits = new Float32Array(80).fill(Number.NEGATIVE_INFINITY)
    logits[3] = 5
    const { loss, lse } = await forward(c, logits, [3, ignoreIndex], { isa })
    expect([...loss]).toEqual([0, 0])
    expect([...lse]).toEqual([5, Number.NEGATIVE_INFINITY])
  })

  test('NaN only affects its own row', async () => {
    const c = { rows: 3, classes: 40, scale: 1 }
    const logits = new Float32Array(120).fill(0.5)
    logits[77] = Number.NaN
    const { loss } = await forward(c, logits, [1, 2, 3], { isa })
    expect([...loss].map(Number.isNaN)).toEqual([false, true, false])
  })

  test('results are bitwise equal with any number of threads', async () => {
    const c = { rows: 400, classes: 333, scale: 2 }
    const { logits, targets, dloss } = data(c)
    const one = await forward(c, logits, targets, { isa, threads: 1 })
    expect(await forward(c, logits, targets, { isa, threads: 2 })).toEqual(one)
    const gradient = await backward(c, logits, targets, one.lse, dloss, { isa, threads: 1 })
    expect(await backward(c, logits, targets, one.lse, dloss, { isa, threads: 2 })).toEqual(gradient)
  })
})
