import { Random } from '@moe/core'
import { describe, expect, onTestFinished, test } from 'vitest'
import { distance, exact, integers, onCpu, onCuda, output } from '../../test-against-cpu.ts'
import { denseVariants, unavailable } from '../../test-backend.ts'
import { limits } from './linear-cross-entropy.ts'

const ignoreIndex = -100
const unusual = [ignoreIndex, -1, 999_999]

// Tails in rows, classes and features; working memory for a part of the vocabulary alone.
const cases = [
  { name: 'one of each', rows: 1, classes: 1, features: 1, skip: 0 },
  { name: 'large tiles', rows: 300, classes: 1100, features: 20, skip: 4 },
  { name: 'no row counts', rows: 3, classes: 5, features: 4, skip: 1 },
  { name: 'no rows', rows: 0, classes: 5, features: 4, skip: 0 },
  { name: 'chunks of the vocabulary', rows: 70, classes: 650, features: 41, skip: 3, chunkBytes: 40_000 },
]

describe.skipIf(unavailable).each(denseVariants)('linear cross-entropy, $precision, $by', ({ precision, options }) => {
  test.each(cases)('$name', async ({ rows, classes, features, skip, chunkBytes = limits.chunkBytes }) => {
    const usual = limits.chunkBytes
    limits.chunkBytes = chunkBytes
    onTestFinished(() => {
      limits.chunkBytes = usual
    })
    const random = new Random(rows + classes)
    const x = exact(random, rows, features)
    const weight = exact(random, classes, features)
    const room = precision === 'bf16' ? 1e-2 : 1e-5
    const targets = integers(
      ...Array.from({ length: rows }, (_, i) =>
        skip > 0 && i % skip === skip - 1 ? unusual[i % 3] : (i * 11) % classes,
      ),
    )
    const attrs = { ignoreIndex, precision }
    const inputs = [x, weight, targets]
    const outputs = [output(rows), output(rows)]
    const expected = await onCpu('linearCrossEntropy', inputs, attrs, outputs)
    const got = await onCuda('linearCrossEntropy', inputs, attrs, outputs, options)
    expect(distance(got[0], expected[0])).toBeLessThan(1e-5)
    expect(distance(got[1], expected[1])).toBeLessThan(1e-5)
    const saved = [{ data: Float32Array.from(expected[1]), shape: [rows] }, exact(random, rows)]
    const gradients = [output(rows, features), output(classes, features)]
    const wanted = await onCpu('linearCrossEntropyBackward', [...inputs, ...saved], attrs, gradients)
    const backward = await onCuda('linearCrossEntropyBackward', [...inputs, ...saved], attrs, gradients, options)
    backward.forEach((d, i) => {
      expect(distance(d, wanted[i])).toBeLessThan(room)
    })
  })
})
