import { Random, toF8e4m3 } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

describe.skipIf(unavailable)('quantize', () => {
  test.each([
    { R: 9, C: 300, block: [1, 128] as const },
    { R: 3, C: 2048, block: [1, 2048] as const },
    { R: 130, C: 257, block: [128, 128] as const },
    { R: 128, C: 512, block: [128, 256] as const },
    { R: 5, C: 7, block: [2, 3] as const },
    { R: 0, C: 8, block: [1, 128] as const },
    { R: 3, C: 0, block: [1, 128] as const },
  ])('$R x $C in blocks of $block', async ({ R, C, block: [br, bc] }) => {
    const x = new Random(1).normal(R * C).map((v, i) => v * 10 ** ((i % 7) - 3))
    x.fill(0, 0, Math.min(x.length, bc))
    const shape = [R, C]
    const [down, across] = [Math.ceil(R / br), Math.ceil(C / bc)]
    const backend = await testBackend()
    const [q, scale] = await runOp(backend, 'quantize', [{ data: x, shape }], { block: [br, bc] }, [
      { shape, dtype: 'f8e4m3' },
      { shape: [down, across], dtype: 'f32' },
    ])
    backend.dispose()
    const largest = new Float64Array(down * across)
    const blockOf = (i: number) => Math.floor(i / C / br) * across + Math.floor((i % C) / bc)
    x.forEach((v, i) => {
      largest[blockOf(i)] = Math.max(largest[blockOf(i)], Math.abs(v))
    })
    const want = Float32Array.from(largest, m => (m === 0 ? 1 : m / 448))
    expect(scale).toEqual(want)
    expect(q).toEqual(Uint8Array.from(x, (v, i) => toF8e4m3(Math.fround(v / want[blockOf(i)]))))
  })

  test('a block of numbers too small for a scale becomes zeros, not NaN', async () => {
    const backend = await testBackend()
    const data = [1e-43, 0, -1e-43, 0]
    const [q, scale] = await runOp(backend, 'quantize', [{ data, shape: [1, 4] }], { block: [1, 4] }, [
      { shape: [1, 4], dtype: 'f8e4m3' },
      { shape: [1, 1], dtype: 'f32' },
    ])
    backend.dispose()
    expect([...scale]).toEqual([1])
    expect([...q].map(code => code & 0x7f)).toEqual([0, 0, 0, 0])
  })

  test('NaN affects only its own block', async () => {
    const backend = await testBackend()
    const data = [1, Number.NaN, 2, 4]
    const [q, scale] = await runOp(backend, 'quantize', [{ data, shape: [1, 4] }], { block: [1, 2] }, [
      { shape: [1, 4], dtype: 'f8e4m3' },
      { shape: [1, 2], dtype: 'f32' },
    ])
    backend.dispose()
    expect(scale[0]).toBeNaN()
    expect(scale[1]).toBe(Math.fround(4 / 448))
    expect([...q].map(code => code & 0x7f)).toEqual([0x7f, 0x7f, toF8e4m3(224), toF8e4m3(448)])
  })
})
