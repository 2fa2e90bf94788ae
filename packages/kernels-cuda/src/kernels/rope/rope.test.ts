import { rope } from '@moe/core'
import { describe, test } from 'vitest'
import { unavailable } from '../../test-backend.ts'
import { compareWithReference, normal } from '../../test-compare-with-reference.ts'

// Positions that share a block, that fill one, and that take several; four features at a time and one. F features are prepended.
const shapes: ReadonlyArray<Record<'B' | 'T' | 'H' | 'D' | 'R', number> & { readonly F?: number }> = [
  { B: 2, T: 19, H: 1, D: 64, R: 64 },
  { B: 1, T: 3, H: 16, D: 192, R: 64 },
  { B: 2, T: 2, H: 3, D: 700, R: 600 },
  { B: 1, T: 9, H: 2, D: 40, R: 36 },
  { B: 3, T: 2, H: 1, D: 7, R: 2 },
  { B: 1, T: 0, H: 4, D: 8, R: 8 },
  { B: 1, T: 4, H: 2, D: 5, R: 0 },
  { B: 1, T: 1, H: 16, D: 192, R: 64, F: 512 },
  { B: 2, T: 3, H: 1, D: 576, R: 64, F: 512 },
  { B: 2, T: 5, H: 3, D: 22, R: 8, F: 12 },
  { B: 2, T: 5, H: 3, D: 24, R: 8, F: 7 },
  { B: 1, T: 5, H: 3, D: 24, R: 8, F: 0 },
  { B: 1, T: 4, H: 2, D: 5, R: 0, F: 3 },
]

describe.skipIf(unavailable)('rope', () => {
  test.each(shapes)('%j', async ({ B, T, H, D, R, F }) => {
    for (const interleaved of [true, false]) {
      for (const table of [
        [T, R / 2],
        [B, T, R / 2],
      ]) {
        const inputs = [normal([B, T, H, D]), normal(table), normal(table, 0.5)]
        if (F !== undefined) inputs.push(normal([B, T, H, F]))
        await compareWithReference(inputs, (x, cos, sin, plain) => [
          rope(x, cos.detach(), sin.detach(), { interleaved, plain }),
        ])
      }
    }
  })
})
