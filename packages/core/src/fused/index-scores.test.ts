import { afterEach, expect, test } from 'vitest'
import { gradients } from '../autograd/backward.ts'
import { fromHost, full, randn } from '../create.ts'
import { where } from '../primitives.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { assertClose } from '../testing/compare.ts'
import { runFused } from './definition.ts'
import { indexScores, indexScoresBackwardDefinition, productLimits } from './index-scores.ts'

const backend = referenceBackend()
const whole = productLimits.elements
afterEach(() => {
  productLimits.elements = whole
})

const [B, T, J, D, S] = [2, 5, 3, 4, 7]
const counts = [3, 7, 0, 9, -2, 7, 1, 2, 3, 4]
const limits = fromHost(Int32Array.from(counts), [B, T], 'i32', backend)

function inputs(): [q: Tensor, weights: Tensor, keys: Tensor] {
  const random = new Random(1)
  const draw = (...shape: number[]) => {
    const x = randn(shape, random, { backend })
    x.tracked = true
    return x
  }
  return [draw(B, T, J, D), draw(B, T, J), draw(B, S, D)]
}
const close = { relative: 1e-6, absolute: 1e-6 }
const gradientsOf = async (loss: Tensor, of: readonly Tensor[]) =>
  Promise.all(gradients(loss, of).map(gradient => (gradient as Tensor).values()))

test('are the sums over heads of weights times ReLU of the products, and -Infinity from the limit on', async () => {
  const given = inputs()
  const [q, w, k] = (await Promise.all(given.map(x => x.values()))).map(values => Array.from(values))
  const expected = Array.from({ length: B * T * S }, (_, i) => {
    const [row, s] = [Math.floor(i / S), i % S]
    if (s >= counts[row]) return Number.NEGATIVE_INFINITY
    const key = k.slice((Math.floor(row / T) * S + s) * D).slice(0, D)
    let score = 0
    for (let j = 0; j < J; j++) {
      const dot = key.reduce((sum, x, d) => sum + x * q[(row * J + j) * D + d], 0)
      score += w[row * J + j] * Math.max(0, dot)
    }
    return score
  })
  assertClose('scores', await indexScores(...given, { limits }).values(), expected, close)
  const all = await indexScores(...given).values()
  expect(all.every(Number.isFinite)).toBe(true)
  const seen = (_: number, i: number) => expected[i] !== Number.NEGATIVE_INFINITY
  assertClose('seen scores', Array.from(all).filter(seen), expected.filter(seen), close)
})

test('gradients pass through the seen keys alone', async () => {
  const given = inputs()
  const factors = randn([B, T, S], new Random(2), { backend })
  const seen = indexScores(...given, { limits }).eq(Number.NEGATIVE_INFINITY)
  const hide = (x: Tensor) => where(seen.detach(), full([], 0, x), x)
  const expected = await gradientsOf(
    hide(indexScores(...given))
      .mul(factors)
      .sum(),
    given,
  )
  const found = await gradientsOf(
    hide(indexScores(...given, { limits }))
      .mul(factors)
      .sum(),
    given,
  )
  const backward = noGrad(() =>
    runFused(indexScoresBackwardDefinition, [...given, factors, limits], { precision: 'f32' }),
  )
  for (const [i, values] of expected.entries()) {
    assertClose(`input ${i}`, found[i], values, close)
    assertClose(`backward of input ${i}`, await backward[i].values(), values, close)
  }
})

test('in pieces, scores and gradients are the same', async () => {
  const given = inputs()
  const factors = randn([B, T, S], new Random(3), { backend })
  const run = async () => {
    const scores = indexScores(...given, { limits })
    const backward = noGrad(() =>
      runFused(indexScoresBackwardDefinition, [...given, factors, limits], { precision: 'f32' }),
    )
    return Promise.all([scores, ...backward].map(x => x.values()))
  }
  const expected = await run()
  for (const queries of [1, 2, 4]) {
    productLimits.elements = queries * B * J * S
    for (const [i, values] of (await run()).entries()) assertClose(`${queries}: ${i}`, values, expected[i], close)
  }
})
