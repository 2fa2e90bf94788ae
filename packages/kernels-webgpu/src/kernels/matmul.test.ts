import { type Backend, groupedMatmul, linearCrossEntropy } from '@moe/core'
import { compareWithReference } from '@moe/core/testing'
import { afterEach, describe, test } from 'vitest'
import { testBackend } from '../test-gpu.ts'
import { integers, normal } from '../test-inputs.ts'
import { limits } from './linear-cross-entropy.ts'
import { limits as productLimits } from './matmul.ts'

const backend = (await testBackend()) as Backend
const flags = [false, true]

describe.skipIf(backend === null)('matmul', () => {
  const sizes: ReadonlyArray<readonly [m: number, n: number, k: number]> = [
    [64, 64, 16],
    [65, 63, 17],
    [68, 132, 20],
    [5, 4, 36],
    // Few rows: up to the four that are computed together, and one more.
    ...[1, 3, 4, 5].map(m => [m, 130, 68] as const),
    [2, 7, 131],
    [4, 129, 5],
    [1, 1, 1],
    [3, 5, 0],
    // k split into parts, with a partial last one.
    [40, 36, 1100],
    [33, 70, 515],
  ]
  test.each(sizes)('%i x %i over %i, transposed or not, single and batched', async (m, n, k) => {
    for (const transposeA of flags) {
      for (const transposeB of flags) {
        for (const lead of [[], [3]]) {
          const a = normal([...lead, ...(transposeA ? [k, m] : [m, k])])
          const b = normal([...lead, ...(transposeB ? [n, k] : [k, n])], 0.5)
          const tolerance = { relative: 5e-5, absolute: 2e-6 * Math.max(k, 10) }
          await compareWithReference(backend, [a, b], (x, y) => [x.matmul(y, { transposeA, transposeB })], tolerance)
        }
      }
    }
  })
})

describe.skipIf(backend === null)('matmul with more matrices or columns than workgroups along an axis', () => {
  const { groups } = productLimits
  afterEach(() => {
    productLimits.groups = groups
  })

  test.each([1, 5])('matrices of %i rows', async rows => {
    productLimits.groups = 3
    const [a, b] = [normal([7, rows, 20]), normal([7, 20, 9])]
    await compareWithReference(backend, [a, b], (x, y) => [x.matmul(y)])
  })

  test.each(flags)('columns of few rows, transposed: %s', async transposeB => {
    productLimits.groups = 3
    const [a, b] = [normal([2, 20]), normal(transposeB ? [500, 20] : [20, 500])]
    await compareWithReference(backend, [a, b], (x, y) => [x.matmul(y, { transposeB })])
  })
})

describe.skipIf(backend === null)('groupedMatmul', () => {
  const cases: ReadonlyArray<readonly [rows: number, n: number, k: number, offsets: readonly number[]]> = [
    // Experts that begin at the end of a tile and next to it.
    [129, 8, 12, [0, 64, 128, 128, 129]],
    [130, 66, 20, [0, 0, 1, 65, 66, 130]],
    [200, 5, 7, [0, 0, 0, 200, 200]],
    [17, 12, 8, [0, 3, 3, 17]],
    [70, 4, 4, [0, 70]],
    // Few rows; rows that belong to no expert; no rows.
    [16, 130, 68, [0, 1, 1, 2, 5, 16]],
    [1, 9, 33, [0, 0, 1, 1]],
    [9, 5, 16, [0, 2, 6]],
    [150, 8, 8, [0, 2, 6]],
    [66, 8, 8, [0, 0, 0]],
    [0, 8, 8, [0, 0]],
  ]
  test.each(cases)('%i rows, %i x %i, %j', async (rows, n, k, offsets) => {
    const ends = integers([...offsets])
    const experts = offsets.length - 1
    for (const transposeW of flags) {
      const weight = normal(transposeW ? [experts, n, k] : [experts, k, n], 0.5)
      await compareWithReference(backend, [normal([rows, k]), weight, ends], (x, w, o) => [
        groupedMatmul(x, w, o, { transposeW }),
      ])
    }
  })
})

describe.skipIf(backend === null)('linearCrossEntropy', () => {
  const { elements } = limits
  afterEach(() => {
    limits.elements = elements
  })

  test.each([
    // More than one tile of rows and features, and parts of one tile of classes, the last of which is partial.
    { N: 70, V: 515, D: 36, partElements: 1 },
    { N: 65, V: 192, D: 20, partElements: 65 * 128 },
    { N: 66, V: 131, D: 33, partElements: elements },
    { N: 1, V: 7, D: 4, partElements: elements },
    { N: 3, V: 1, D: 8, partElements: elements },
  ])('$N rows, $V classes, $D features, $partElements elements per part', async ({ N, V, D, partElements }) => {
    limits.elements = partElements
    const targets = Array.from({ length: N }, (_, i) => [(i * 37) % V, V - 1, -100, V, -1][i % 5])
    const inputs = [normal([N, D]), normal([V, D], 0.4), integers(targets)]
    await compareWithReference(backend, inputs, (x, w, t) => [linearCrossEntropy(x, w, t)])
  })

  test('padding of the classes does not contribute to very negative logits', async () => {
    const x = { data: new Array(8).fill(10), shape: [2, 4] }
    const w = normal([5, 4])
    const inputs = [x, { ...w, data: Array.from(w.data, value => value - 6) }, integers([4, 0])]
    const tolerance = { relative: 1e-5, absolute: 2e-3 } // f32 near 250, times 10
    await compareWithReference(backend, inputs, (a, b, t) => [linearCrossEntropy(a, b, t)], tolerance)
  })

  test('large logits do not overflow', async () => {
    const inputs = [normal([5, 8], 30), normal([140, 8], 10), integers([0, 64, 139, 7, 100])]
    const tolerance = { relative: 1e-5, absolute: 2e-3 } // f32 near 1,000, times weights of the gradient
    await compareWithReference(backend, inputs, (x, w, t) => [linearCrossEntropy(x, w, t)], tolerance)
  })
})
