import { Random } from '@moe/core'
import { describe, test } from 'vitest'
import { assertNearCpu, exact, integers, output } from '../../test-against-cpu.ts'
import { productVariants, unavailable } from '../../test-backend.ts'

const cases = [
  { name: 'empty experts, first, last and between', offsets: [0, 0, 1, 1, 30, 130, 130], rows: 130, k: 33, n: 130 },
  { name: 'rows after the last expert', offsets: [0, 20, 50, 51], rows: 150, k: 40, n: 70 },
  { name: 'no expert has rows', offsets: [0, 0, 0], rows: 4, k: 8, n: 9 },
  {
    name: 'more experts than a warp has lanes',
    offsets: Array.from({ length: 71 }, (_, e) => (e * e) >> 4),
    rows: 320,
    k: 17,
    n: 40,
  },
  { name: 'large tiles', offsets: [0, 250, 260, 400], rows: 400, k: 70, n: 520 },
  { name: 'few rows', offsets: [0, 1, 1, 10, 12, 12], rows: 14, k: 600, n: 37 },
  { name: 'k = 0', offsets: [0, 2], rows: 2, k: 0, n: 3 },
]

describe.skipIf(unavailable).each(productVariants)(
  'grouped matmul, $precision, wgmma $wgmma',
  ({ precision, wgmma }) => {
    test.each(cases)('$name', async ({ offsets, rows, k, n }) => {
      const random = new Random(rows)
      const experts = offsets.length - 1
      const x = exact(random, rows, k)
      const ends = integers(...offsets)
      for (const transposeW of [true, false]) {
        const weight = exact(random, experts, ...(transposeW ? [n, k] : [k, n]))
        const attrs = { transposeW, precision }
        await assertNearCpu('groupedMatmul', [x, weight, ends], attrs, [output(rows, n)], 2e-6, { wgmma })
      }
      const inputs = [x, exact(random, rows, n), ends]
      const gradient = [output(experts, n, k)]
      await assertNearCpu('groupedMatmulWeightGrad', inputs, { precision }, gradient, 2e-6, { wgmma })
    })
  },
)
