import { attention, type Backend, latentAttention, Random } from '@moe/core'
import { compareWithReference, runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend } from '../test-gpu.ts'
import { integers, normal } from '../test-inputs.ts'

const backend = (await testBackend()) as Backend

describe.skipIf(backend === null)('attention of few queries', () => {
  test.each([
    { T: 1, S: 130, H: 6, G: 6, Dk: 24, Dv: 16 },
    { T: 3, S: 40, H: 6, G: 2, Dk: 5, Dv: 7 },
    { T: 16, S: 16, H: 2, G: 1, Dk: 640, Dv: 512 },
    { T: 5, S: 3, H: 1, G: 1, Dk: 8, Dv: 129 },
    // Keys split into parts, some of which no query attends to.
    { T: 1, S: 2100, H: 4, G: 4, Dk: 12, Dv: 8 },
    { T: 2, S: 1031, H: 3, G: 1, Dk: 3, Dv: 5 },
  ])('$T queries, $S keys, $H heads, $G key heads, $Dk and $Dv features', async ({ T, S, H, G, Dk, Dv }) => {
    const inputs = [normal([2, T, H, Dk]), normal([2, S, G, Dk], 0.9), normal([2, S, G, Dv])]
    await compareWithReference(backend, inputs, (q, k, v) => [attention(q, k, v).detach()])
    const starts = Array.from({ length: 2 * T }, (_, n) => Math.floor((S * n) / (2 * T)) - 1)
    const ranges = [integers([S, Math.min(S, T + 1)]), integers(starts, [2, T])]
    await compareWithReference(backend, [...inputs, ...ranges], (q, k, v, lengths, starts) => [
      attention(q, k, v, { lengths, starts, causal: T % 2 === 1 }).detach(),
    ])
  })

  test.each([
    { T: 1, H: 6, C: 80, V: 64, lengths: [1500, 0, 3] },
    { T: 4, H: 3, C: 33, V: 10, lengths: [1024, 2, 1027] },
    { T: 2, H: 130, C: 576, V: 512, lengths: [20] },
  ])('latent cache: $T queries, $H heads, lengths $lengths', async ({ T, H, C, V, lengths }) => {
    const [B, P] = [lengths.length, 128]
    const M = Math.ceil(Math.max(...lengths) / P) + 1
    // Unused rows are NaN and must never be read.
    const data = new Random(2).normal(B * M * P * C)
    lengths.forEach((length, b) => {
      data.fill(Number.NaN, (b * M * P + length) * C, (b + 1) * M * P * C)
    })
    const q = normal([B, T, H, C], 0.5)
    const options = { scale: 0.2, valueDim: V }
    const pages = integers(
      Array.from({ length: B * M }, (_, n) => n),
      [B, M],
    )
    const comparePaged = (dtype: 'f32' | 'bf16') =>
      compareWithReference(
        backend,
        [q, { data, shape: [B * M, P, C], dtype }, integers(lengths), pages],
        (x, cache, rows, pages) => [latentAttention(x.detach(), cache.detach(), rows, { ...options, pages })],
      )
    await comparePaged('bf16')
    const { outputs } = await comparePaged('f32')
    const inRows = [q, { data, shape: [B, M * P, C] }, integers(lengths)]
    const spec = { shape: [B, T, H, V], dtype: 'f32' } as const
    const [y] = await runOp(backend, 'latentAttention', inRows, { ...options, precision: 'f32' }, [spec])
    expect(y).toEqual(outputs[0])
  })
})

describe.skipIf(backend === null)('topk', () => {
  test.each([64, 65, 300, 1000])(
    'selects the same elements as the reference in rows of %i with ties and NaN',
    async size => {
      const random = new Random(size)
      const data = Float32Array.from({ length: 3 * size }, () => random.integer(20))
      data.fill(Number.NaN, size, size + 10)
      data.fill(Number.NEGATIVE_INFINITY, 2 * size + 1)
      await compareWithReference(backend, [{ data, shape: [3, size] }], x => {
        const { values, indices } = x.detach().topk(40)
        return [values, indices]
      })
    },
  )
})
