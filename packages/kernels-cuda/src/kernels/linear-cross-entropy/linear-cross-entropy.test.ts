import { Random } from '@moe/core'
import { describe, expect, onTestFinished, test } from 'vitest'
import { assertNear, distance, exact, integers, onCpu, onCuda, output } from '../../test-against-cpu.ts'
import { denseVariants, reverseOrder, unavailable } from '../../test-backend.ts'
import { hopperTiles } from '../matmul-sm90a/product.ts'
import { evenChunk, limits } from './linear-cross-entropy.ts'

const ignoreIndex = -100

/**
 * The error of the loss of a single class, which should be 0, and of its probability, which should be 1. e^(x - x) is 2^(x log2(e) - x log2(e)), where the rounding error of one product remains, 2^-24 of it, and `ex2.approx` is
 * off by 2^-22: for |x| below 4 that is 2^-21 in all. Rounding lse adds 2^-23.
 */
const singleClassError = 2 ** -21 + 2 ** -23
const ignoredTargets = [ignoreIndex, -1, 999_999]

// Partial tiles of rows, classes and features, and working memory for only a part of the vocabulary.
const cases = [
  { name: 'one of each', rows: 1, classes: 1, features: 1, skip: 0 },
  { name: 'large tiles', rows: 300, classes: 1100, features: 20, skip: 4 },
  { name: 'large tiles, many steps', rows: 130, classes: 800, features: 330, skip: 5 },
  { name: 'small tiles, many steps', rows: 140, classes: 121, features: 523, skip: 6 },
  { name: 'full tiles and a partial one', rows: 300, classes: 504, features: 24, skip: 3 },
  { name: 'chunks of full tiles', rows: 300, classes: 1024, features: 24, skip: 3, chunkBytes: 320_000 },
  { name: 'one class more than a tile', rows: 129, classes: 257, features: 64, skip: 0 },
  { name: 'no features', rows: 9, classes: 5, features: 0, skip: 2 },
  { name: 'all targets ignored', rows: 3, classes: 5, features: 4, skip: 1 },
  { name: 'no rows', rows: 0, classes: 5, features: 4, skip: 0 },
  { name: 'chunks of the vocabulary', rows: 70, classes: 650, features: 41, skip: 3, chunkBytes: 40_000 },
  {
    name: 'chunks of a weight that is rounded at once',
    rows: 1100,
    classes: 300,
    features: 24,
    skip: 7,
    chunkBytes: 20_000,
  },
  { name: 'chunks and many rows', rows: 1100, classes: 300, features: 24, skip: 7, chunkBytes: 1 },
]

/** If not zero, every `skip`-th target is ignored. */
const targetsOf = (rows: number, classes: number, skip: number) =>
  integers(
    ...Array.from({ length: rows }, (_, i) =>
      skip > 0 && i % skip === skip - 1 ? ignoredTargets[i % 3] : (i * 11) % classes,
    ),
  )

/** Sets the size of working memory until the test ends. */
function limitChunks(bytes: number) {
  const usual = limits.chunkBytes
  limits.chunkBytes = bytes
  onTestFinished(() => {
    limits.chunkBytes = usual
  })
}

describe.skipIf(unavailable).each(denseVariants)('linear cross-entropy, $precision, $by', ({ precision, options }) => {
  test.each(cases)('$name', async ({ rows, classes, features, skip, chunkBytes = limits.chunkBytes }) => {
    limitChunks(chunkBytes)
    const random = new Random(rows + classes)
    const x = exact(random, rows, features)
    // Logits of about 1 for any number of features.
    const scale = 2 ** -Math.round(Math.log2(features + 1) / 2)
    const { data, shape } = exact(random, classes, features)
    const weight = { data: Float32Array.from(data, w => w * scale), shape }
    const tolerance = precision === 'bf16' ? 1e-2 : 1e-5
    const targets = targetsOf(rows, classes, skip)
    const attrs = { ignoreIndex, precision }
    const inputs = [x, weight, targets]
    const outputs = [output(rows), output(rows)]
    const expected = await onCpu('linearCrossEntropy', inputs, attrs, outputs)
    const got = await onCuda('linearCrossEntropy', inputs, attrs, outputs, options)
    got.forEach((x, i) => {
      assertNear(['losses', 'lse'][i], x, expected[i], 1e-5, [rows], classes === 1 ? singleClassError : 0)
    })
    const saved = [{ data: Float32Array.from(expected[1]), shape: [rows] }, exact(random, rows)]
    const gradients = [output(rows, features), output(classes, features)]
    const expectedGradients = await onCpu('linearCrossEntropyBackward', [...inputs, ...saved], attrs, gradients)
    const backward = await onCuda('linearCrossEntropyBackward', [...inputs, ...saved], attrs, gradients, options)
    backward.forEach((d, i) => {
      const others = [weight, x][i].data as Float32Array
      const largest = others.reduce((most, v) => Math.max(most, Math.abs(v)), 0)
      const absolute = classes === 1 ? singleClassError * largest * Math.abs(Number(saved[1].data[0])) : 0
      assertNear(['dx', 'dweight'][i], d, expectedGradients[i], tolerance, gradients[i].shape, absolute)
    })
  })

  test('results are bitwise identical in every run, in any order of blocks', async () => {
    limitChunks(1)
    const [rows, classes, features] = [150, 700, 130]
    const random = new Random(5)
    const inputs = [exact(random, rows, features), exact(random, classes, features), targetsOf(rows, classes, 4)]
    const saved = [exact(random, rows), exact(random, rows)]
    const attrs = { ignoreIndex, precision }
    const run = async () => [
      ...(await onCuda('linearCrossEntropy', inputs, attrs, [output(rows), output(rows)], options)),
      ...(await onCuda(
        'linearCrossEntropyBackward',
        [...inputs, ...saved],
        attrs,
        [output(rows, features), output(classes, features)],
        options,
      )),
    ]
    const first = await run()
    reverseOrder(true)
    onTestFinished(() => reverseOrder(false))
    expect(await run()).toEqual(first)
  })

  test.each([-1, 1])('large logits do not overflow (%i)', async sign => {
    const [rows, classes, features] = [3, 5, 8]
    const random = new Random(7)
    const weight = Float32Array.from(exact(random, classes, features).data, w => sign * (w + 64))
    const inputs = [
      { data: new Float32Array(rows * features).fill(1), shape: [rows, features] },
      // Multiples of a half, which bf16 represents up to 128.
      { data: weight.map(w => Math.round(w * 2) / 2), shape: [classes, features] },
      integers(0, 1, 4),
    ]
    const outputs = [output(rows), output(rows)]
    const attrs = { ignoreIndex, precision }
    const expected = await onCpu('linearCrossEntropy', inputs, attrs, outputs)
    const got = await onCuda('linearCrossEntropy', inputs, attrs, outputs, options)
    expect(Math.abs(expected[1][0])).toBeGreaterThan(400)
    expect(distance(got[0], expected[0])).toBeLessThan(1e-4)
    expect(distance(got[1], expected[1])).toBeLessThan(1e-6)
  })

  test('NaN affects only its row, and an infinity only its class', async () => {
    const [rows, classes, features] = [5, 300, 70]
    const random = new Random(6)
    const x = Float32Array.from(exact(random, rows, features).data, (v, i) => (i % features === 0 ? 1 : v))
    const weight = Float32Array.from(exact(random, classes, features).data)
    x[2 * features - 1] = Number.NaN
    weight[(classes - 1) * features] = Number.NEGATIVE_INFINITY
    const inputs = [
      { data: x, shape: [rows, features] },
      { data: weight, shape: [classes, features] },
      integers(0, 1, 2, 299, 7),
    ]
    const attrs = { ignoreIndex, precision }
    const outputs = [output(rows), output(rows)]
    const expected = await onCpu('linearCrossEntropy', inputs, attrs, outputs)
    const got = await onCuda('linearCrossEntropy', inputs, attrs, outputs, options)
    expect([...got[0], ...got[1]].map(Number.isFinite)).toEqual([...expected[0], ...expected[1]].map(Number.isFinite))
    expect(distance(got[0], expected[0])).toBeLessThan(1e-5)
    const saved = [{ data: Float32Array.from(expected[1]), shape: [rows] }, exact(random, rows)]
    const gradients = [output(rows, features), output(classes, features)]
    const expectedGradients = await onCpu('linearCrossEntropyBackward', [...inputs, ...saved], attrs, gradients)
    const backward = await onCuda('linearCrossEntropyBackward', [...inputs, ...saved], attrs, gradients, options)
    backward.forEach((d, i) => {
      expect([...d].map(Number.isNaN)).toEqual([...expectedGradients[i]].map(Number.isNaN))
    })
  })
})

test('chunks fill all multiprocessors', () => {
  const [large] = hopperTiles
  const chunk = (most: number, rows: number, features: number) =>
    evenChunk({ multiprocessors: 132 }, hopperTiles, large, most, { rows, features })
  // 25 tiles would be 1,600 blocks of logits, which take 13 waves, and 400 of gradients, which take four.
  expect(chunk(6400, 8192, 2048)).toBe(6144)
  expect(chunk(256, 8192, 2048)).toBe(256)
})
