import { swiglu } from '@moe/core'
import { describe, test } from 'vitest'
import { unavailable } from '../../test-backend.ts'
import { compareWithReference, normal } from '../../test-compare-with-reference.ts'

describe.skipIf(unavailable)('swiglu', () => {
  // More elements than threads of the grid.
  test.each([0, 3, 70_001])('%i elements', async n => {
    await compareWithReference(
      [normal([n], 4), normal([1, n])].map(x => ({ ...x, shape: [n] })),
      (gate, up) => [swiglu(gate, up)],
    )
  })
})
