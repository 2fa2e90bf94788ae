import { type Backend, concat, type DType, fromF8e4m3, full, setRows, type Tensor } from '@moe/core'
import { compareWithReference, type HostInput, tolerances } from '@moe/core/testing'
import { describe, test } from 'vitest'
import { testBackend } from '../test-gpu.ts'
import { integers, normal } from '../test-inputs.ts'

const backend = (await testBackend()) as Backend
const small: readonly DType[] = ['u8', 'bf16', 'f8e4m3']

const randomInput = (dtype: DType, shape: readonly number[]): HostInput => {
  const { data } = normal(shape)
  return { data: Array.from(data, x => (dtype === 'u8' ? Math.round(Math.abs(100 * x)) % 256 : x)), shape, dtype }
}
const exactly = (inputs: readonly HostInput[], op: (...inputs: Tensor[]) => Tensor[]) =>
  compareWithReference(backend, inputs, op, tolerances.exact)

describe.skipIf(backend === null).each(small)('%s, where elements of different rows share words:', dtype => {
  test.each([
    [1, 1, 1],
    [3, 5, 7],
    [9, 33, 6],
    [2, 64, 8],
  ])('%i x %i x %i transposed, sliced, repeated', async (a, b, c) => {
    await exactly([randomInput(dtype, [a, b, c])], x => [
      x.permute([2, 0, 1]),
      x.permute([1, 0, 2]),
      x.narrow(1, Math.min(1, b - 1), b),
      x.narrow(2, 0, Math.max(1, c - 2)),
      x.reshape([1, a * b * c]).expand([3, a * b * c]),
      x.reshape([a * b, 1, c]).expand([a * b, 3, c]),
      x.pad([0, 1, 1], [1, 0, 2], 3),
    ])
  })

  test.each([1, 3, 4, 1001])('%i equal elements', async count => {
    await exactly([randomInput(dtype, [1])], ({ backend }) => [full([count], 3, { dtype, backend })])
  })

  test.each([
    [1, [1, 1, 1, 2]],
    [67, [3, 5, 2, 1]],
    [40, [4, 8, 0, 6]],
    [300, [1, 2]],
  ])('%i rows concatenated, widths %j', async (rows, widths) => {
    const parts = widths.map(width => randomInput(dtype, [rows, width]))
    await exactly(parts, (...xs) => [concat(xs, 1)])
    await exactly(
      widths.map(width => randomInput(dtype, [width, rows])),
      (...xs) => [concat(xs, 0)],
    )
  })

  test.each([1, 3, 6, 8])('rows of %i, gathered and replaced', async width => {
    const index = integers([4, 0, 69, -1, 70, 4, 33, 34, 32])
    await exactly([randomInput(dtype, [70, width]), index], (x, rows) => [
      x.takeRows(rows),
      x.takeRows(rows.reshape([3, 3])),
    ])
    await exactly([randomInput(dtype, [70, width]), index, randomInput(dtype, [9, width])], (x, rows, source) => [
      setRows(x, rows, source),
    ])
  })
})

describe.skipIf(backend === null)('casts', () => {
  test('of every f8e4m3 value', async () => {
    const data = Array.from({ length: 256 }, (_, code) => fromF8e4m3(code))
    await exactly([{ data, shape: [256], dtype: 'f8e4m3' }], x => [x.cast('f32'), x.cast('i32'), x.cast('bf16')])
  })

  test('to f8e4m3 and bf16, at and near rounding ties and at the limits of the range', async () => {
    const numbers = Array.from({ length: 127 }, (_, code) => fromF8e4m3(code))
    const between = numbers.flatMap((x, i) => (i === 0 ? [] : [(x + numbers[i - 1]) / 2]))
    const near = [...numbers, ...between].flatMap(x => [x, x * (1 + 2 ** -20), x * (1 - 2 ** -20)])
    const halves = [1, 1.5, 1.99, 2 ** 100, 2 ** -100].flatMap(x =>
      [0, 1, 2, 3].flatMap(i => [x * (1 + i * 2 ** -8), x * (1 + i * 2 ** -8 + 2 ** -20)]),
    )
    const ends = [0, -0, 447, 448, 449, 464, 480, 1e30, 3.3961e38, 3.4e38, Number.POSITIVE_INFINITY, Number.NaN]
    const data = [...near, ...halves, ...ends].flatMap(x => [x, -x])
    await exactly([{ data, shape: [data.length] }], given => {
      const x = given.detach()
      return [x.cast('bf16'), x.cast('f8e4m3'), x.cast('u8'), x.cast('bf16').cast('f8e4m3'), x.cast('bf16').cast('f32')]
    })
  })

  test('of integers', async () => {
    const data = [0, 1, -1, 7, 9, 17, 255, 256, 257, 300, 449, -500, 65_537, 2 ** 31 - 1, -(2 ** 31)]
    await exactly([integers(data)], x => [x.cast('u8'), x.cast('bf16'), x.cast('f8e4m3'), x.cast('f32')])
    await exactly([{ data: Array.from({ length: 255 }, (_, i) => i), shape: [255], dtype: 'u8' }], x => [
      x.cast('bf16'),
      x.cast('f8e4m3'),
      x.cast('i32'),
    ])
  })
})
