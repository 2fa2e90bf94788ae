import { expect, test } from 'vitest'
import { fromHost, tensor } from '../create.ts'
import { encodeHost } from '../dtype.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { latentAttention } from './attention.ts'

const backend = referenceBackend()
const i32 = (values: readonly number[], ...shape: number[]) => tensor(Int32Array.from(values), shape, { backend })

test.each(['f32', 'bf16'] as const)(
  'latentAttention over random pages equals that over contiguous rows, %s',
  async dtype => {
    for (let seed = 0; seed < 40; seed++) {
      const random = new Random(seed)
      const size = (min: number, max: number) => min + random.integer(max - min + 1)
      const [B, T, H, C, N, P, M] = [size(1, 3), size(1, 3), size(1, 2), 6, size(1, 5), size(1, 5), size(1, 4)]
      const lengths = Array.from({ length: B }, () => random.integer(M * P + 1))
      const table = Array.from({ length: B * M }, () => random.integer(N))
      const numbers = random.normal(N * P * C)
      const inUse = new Set<number>()
      const rows = new Float32Array(B * M * P * C)
      lengths.forEach((length, b) => {
        for (let s = 0; s < length; s++) {
          const row = table[b * M + Math.floor(s / P)] * P + (s % P)
          inUse.add(row)
          rows.set(numbers.subarray(row * C, (row + 1) * C), (b * M * P + s) * C)
        }
      })
      const cache = numbers.map((x, i) => (inUse.has(Math.floor(i / C)) ? x : Number.NaN))
      const stored = (data: Float32Array, ...shape: number[]) =>
        fromHost(encodeHost(dtype, data), shape, dtype, backend)
      const q = tensor(random.normal(B * T * H * C), [B, T, H, C], { backend })
      const used = i32(lengths, B)
      const options = { scale: 0.4, valueDim: 4, precision: 'f32' } as const
      const paged = latentAttention(q, stored(cache, N, P, C), used, { ...options, pages: i32(table, B, M) })
      const contiguous = latentAttention(q, stored(rows, B, M * P, C), used, options)
      expect(await paged.values(), `seed ${seed}`).toEqual(await contiguous.values())
    }
  },
)
