import { rmsNorm } from '@moe/core'
import { describe, test } from 'vitest'
import { unavailable } from '../../test-backend.ts'
import { compareWithReference, normal } from '../../test-compare-with-reference.ts'

// Rows processed by a warp, several per warp, and rows processed by a block, longer than it holds in registers.
describe.skipIf(unavailable)('rmsNorm', () => {
  test.each([
    [1, 1],
    [500, 64],
    [5, 1024],
    [70, 1028],
    [11, 1027],
    [2, 9000],
    [2, 14_000],
    [0, 8],
  ])('%i rows of %i', async (rows, length) => {
    const tolerance = { relative: 2e-4, absolute: 1e-4 } // dweight sums all rows
    await compareWithReference(
      [normal([rows, length]), normal([length])],
      (x, weight) => [rmsNorm(x, weight, 1e-5)],
      tolerance,
    )
  })
})
