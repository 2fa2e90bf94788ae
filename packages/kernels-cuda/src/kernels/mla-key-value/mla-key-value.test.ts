import { mlaKeyValue } from '@moe/core'
import { describe, test } from 'vitest'
import { unavailable } from '../../test-backend.ts'
import { compareWithReference, normal } from '../../test-compare-with-reference.ts'

// Four features at a time and one; more elements than threads of the grid.
const shapes = [
  { P: 5, H: 16, N: 128, R: 64, V: 128 },
  { P: 300, H: 4, N: 32, R: 16, V: 36 },
  { P: 5, H: 3, N: 7, R: 3, V: 21 },
  { P: 3, H: 1, N: 0, R: 2, V: 5 },
  { P: 4, H: 2, N: 6, R: 0, V: 0 },
  { P: 0, H: 2, N: 4, R: 4, V: 4 },
]

describe.skipIf(unavailable)('mlaKeyValue', () => {
  test.each(shapes)('$P positions, $H heads of $N + $R and $V', async ({ P, H, N, R, V }) => {
    await compareWithReference([normal([1, P, H, N + V]), normal([1, P, 1, R])], (kv, ropeKey) =>
      Object.values(mlaKeyValue(kv, ropeKey, N)),
    )
  })
})
