import { fromF8e4m3, quantize, Random, scope, tensor, toF8e4m3 } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'

describe.each(await availableIsas())('quantize on %s', isa => {
  test.each([
    { R: 3, C: 300, block: [1, 128] as const },
    { R: 130, C: 257, block: [128, 128] as const },
    { R: 5, C: 7, block: [2, 3] as const },
    { R: 0, C: 8, block: [1, 128] as const },
  ])('rounds $R x $C in blocks of $block to the nearest codes', async ({ R, C, block: [br, bc] }) => {
    const random = new Random(1)
    const x = random.normal(R * C).map((v, i) => v * 10 ** ((i % 7) - 3))
    x.fill(0, 0, Math.min(x.length, bc))
    const shape = [R, C]
    const [down, across] = [Math.ceil(R / br), Math.ceil(C / bc)]
    const backend = await testBackend({ isa })
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
    const isClose = (v: number, i: number) =>
      Math.abs(fromF8e4m3(q[i]) * want[blockOf(i)] - v) <= largest[blockOf(i)] / 16
    expect(x.every(isClose)).toBe(true)
  })

  test('a block of numbers too small for a scale becomes zeros, not NaN', async () => {
    const backend = await testBackend({ isa })
    for (const of of [backend, { ...backend, fused: {} }]) {
      const { q, scale } = scope(() => quantize(tensor([1e-43, 0, -1e-43, 0], [1, 4], { backend: of }), [1, 4]))
      expect([...(await q.values())].map(Math.abs)).toEqual([0, 0, 0, 0])
      expect([...(await scale.values())]).toEqual([1])
    }
    backend.dispose()
  })

  test('NaN only affects its own block', async () => {
    const backend = await testBackend({ isa })
    const data = [1, Number.NaN, 2, 4]
    const [q, scale] = await runOp(backend, 'quantize', [{ data, shape: [1, 4] }], { block: [1, 2] }, [
      { shape: [1, 4], dtype: 'f8e4m3' },
      { shape: [1, 2], dtype: 'f32' },
    ])
    expect(scale[0]).toBeNaN()
    expect(scale[1]).toBe(Math.fround(4 / 448))
    expect([...q]).toEqual([0x7f, 0x7f, toF8e4m3(224), toF8e4m3(448)])
    backend.dispose()
  })
})
