import { beforeEach, expect, test } from 'vitest'
import { arange, fromHost, full, ones, rand, randn, tensor, zeros } from './create.ts'
import { setDefaultBackend } from './default-backend.ts'
import { type DType, toBf16 } from './dtype.ts'
import { Random } from './random.ts'
import { referenceBackend } from './reference/index.ts'
import type { Tensor } from './tensor.ts'

beforeEach(() => setDefaultBackend(referenceBackend()))
const list = async (t: Tensor) => Array.from(await t.values())
const rejection = (message = /./) =>
  expect.objectContaining({ code: 'E_SHAPE', message: expect.stringMatching(message) })

test('shape and dtype follow from the values', async () => {
  expect(tensor([1, 2])).toMatchObject({ shape: [2], dtype: 'f32' })
  expect(tensor(Int32Array.of(1, 2, 3), [3, 1])).toMatchObject({ shape: [3, 1], dtype: 'i32' })
  expect(tensor(Uint8Array.of(1))).toMatchObject({ dtype: 'u8' })
  expect(tensor([1.5], [], { dtype: 'bf16' })).toMatchObject({ shape: [], dtype: 'bf16', rank: 0, size: 1 })
  expect(await list(zeros([2, 1]))).toEqual([0, 0])
  expect(await list(ones([2], { dtype: 'u8' }))).toEqual([1, 1])
  expect(await list(full([2], -3, { dtype: 'i32' }))).toEqual([-3, -3])
  expect(await list(arange(4))).toEqual([0, 1, 2, 3])
  expect(await list(zeros([3, 0]))).toEqual([])
})

test('copies the given array, and returns new ones', async () => {
  const data = Float32Array.of(1, 2)
  const x = tensor(data)
  data[0] = 9
  const first = await x.values()
  first[1] = 9
  expect(await list(x)).toEqual([1, 2])
})

test('for 16- and 8-bit floats, numbers are encoded and host arrays are bit patterns', async () => {
  const rounded = tensor([1.01], [1], { dtype: 'bf16' })
  expect(await rounded.data()).toEqual(Uint16Array.of(toBf16(1.01)))
  expect(await list(rounded)).toEqual([1.0078125])
  expect(await list(fromHost(Uint16Array.of(0x3c00), [1], 'f16'))).toEqual([1])
  expect(await list(fromHost(Uint8Array.of(0x7e), [1], 'f8e4m3'))).toEqual([448])
})

test('invalid shapes are rejected before they reach a backend', () => {
  for (const shape of [[-1], [2.5], [Number.NaN], [-2, -3]]) {
    expect(() => zeros(shape), `zeros ${shape}`).toThrow(rejection(/^zeros: expected sizes that are non-negative/))
    expect(() => tensor([1, 2, 3, 4, 5, 6], shape), `tensor ${shape}`).toThrow(rejection())
  }
  expect(() => tensor([1, 2, 3], [2])).toThrow(
    rejection(/^tensor: got 3 values for shape \[2\]; pass 2 values, or their shape/),
  )
})

test('a size that is a string is shown as a string', () => {
  expect(() => zeros(['3'] as unknown as number[])).toThrow(
    rejection(/^zeros: .* got \["3"\]; pass a shape such as \[2, 3\]/),
  )
})

test('dtype names of other libraries are rejected with a list of valid ones', () => {
  const wrong = 'float32' as DType
  const unknownDtype = expect.objectContaining({
    code: 'E_DTYPE',
    message: expect.stringMatching(/: "float32" is not a dtype; pass one of f32, bf16, f16, f8e4m3, i32, u8$/),
  })
  expect(() => zeros([1], { dtype: wrong })).toThrow(unknownDtype)
  expect(() => tensor([1], [1], { dtype: wrong })).toThrow(unknownDtype)
  expect(() => fromHost(Float32Array.of(1), [1], wrong)).toThrow(unknownDtype)
  expect(() => tensor([1]).cast(wrong)).toThrow(unknownDtype)
})

test('random tensors contain the numbers of the stream', async () => {
  const normal = randn([2, 3], new Random(8), { std: 0.5 })
  expect(await normal.values()).toEqual(new Random(8).normal(6, 0.5))
  const uniform = await rand([50], new Random(9), { low: -2, high: 3 }).values()
  expect(Math.min(...uniform)).toBeLessThan(-1)
  expect(Math.max(...uniform)).toBeGreaterThan(2)
  expect(uniform.every(x => x >= -2 && x < 3)).toBe(true)
  expect((await list(randn([2], new Random(8), { std: 0 }))).map(Math.abs)).toEqual([0, 0])
  expect(await list(rand([2], new Random(9), { low: 2, high: 2 }))).toEqual([2, 2])
})

test('rand never returns the upper end of its range, although f32 rounds numbers just below it up', async () => {
  class Largest extends Random {
    override uniform = (length: number) => new Float32Array(length).fill(1 - 2 ** -24)
  }
  for (const [low, high] of [
    [0, 1],
    [1, 2],
    [100, 101],
    [-0.1, 0.1],
  ]) {
    const [x] = await rand([1], new Largest(1), { low, high }).values()
    expect(x).toBeGreaterThanOrEqual(Math.fround(low))
    expect(x).toBeLessThan(high)
  }
})

test('rand and randn reject a missing generator, or a seed in its place', () => {
  for (const draw of [rand, randn]) {
    for (const none of [undefined, null, 1]) {
      expect(() => draw([2], none as never)).toThrow(`${draw.name}: the generator is`)
      expect(() => draw([2], none as never)).toThrow(`pass a generator: ${draw.name}(shape, new Random(seed))`)
    }
    expect(() => draw([2], new Random(1), { hihg: 1 } as never)).toThrow('unknown option hihg')
  }
})
