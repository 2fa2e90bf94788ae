import { type DType, hostArray, Random } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

/** Returns `n` indices of rows. One row occurs very often, and some indices are out of range. */
function hotIndex(n: number, rows: number): Int32Array {
  const random = new Random(n)
  return Int32Array.from({ length: n }, () => (random.next() < 0.3 ? 2 : Math.floor(random.next() * (rows + 2)) - 1))
}

describe.skipIf(unavailable)('on the device', () => {
  test.each([
    [1500, 40, 8],
    [700, 900, 3],
    [900, 300, 1],
  ])('scatterAddRows of %i sources to %i rows of %i adds in source order', async (n, rows, width) => {
    const backend = await testBackend()
    const index = hotIndex(n, rows)
    const source = new Random(width).normal(n * width)
    const expected = new Float32Array(rows * width)
    index.forEach((row, i) => {
      if (row < 0 || row >= rows) return
      for (let j = 0; j < width; j++) expected[row * width + j] += source[i * width + j]
    })
    const inputs = [
      { data: index, shape: [n], dtype: 'i32' },
      { data: source, shape: [n, width] },
    ] as const
    const outputs = [{ shape: [rows, width], dtype: 'f32' }] as const
    expect(await runOp(backend, 'scatterAddRows', inputs, { rows }, outputs)).toEqual([expected])
    backend.dispose()
  })

  // With few sources, blocks search for the last one; with many, a table contains it.
  test.each([
    [60, 20, 4],
    [300, 50, 1030],
    [4500, 3000, 1],
  ])('setRows of %i sources to %i rows of %i', async (n, rows, width) => {
    const backend = await testBackend()
    const index = hotIndex(n, rows)
    const x = new Random(1).normal(rows * width)
    const source = new Random(2).normal(n * width)
    const expected = x.slice()
    index.forEach((row, i) => {
      if (row >= 0 && row < rows) expected.set(source.subarray(i * width, (i + 1) * width), row * width)
    })
    const inputs = [
      { data: x, shape: [rows, width] },
      { data: index, shape: [n], dtype: 'i32' },
      { data: source, shape: [n, width] },
    ] as const
    const outputs = [{ shape: [rows, width], dtype: 'f32' }] as const
    for (const donate of [false, true]) {
      expect(await runOp(backend, 'setRows', inputs, { donate }, outputs)).toEqual([expected])
    }
    backend.dispose()
  })

  // Rows of 1, 2, 4, 8 and 16 bytes and multiples of them, moved in units of 1 to 16 bytes.
  const dtypes: readonly DType[] = ['u8', 'bf16', 'f32']
  test.each(dtypes.flatMap(dtype => [1, 3, 4, 6, 32].map(width => [dtype, width] as const)))(
    'takeRows of %s rows of %i',
    async (dtype, width) => {
      const backend = await testBackend()
      const [rows, n] = [11, 30]
      const index = hotIndex(n, rows)
      const x = hostArray(dtype, rows * width).map(() => 0)
      for (let i = 0; i < x.length; i++) x[i] = i % 251
      const y = hostArray(dtype, n * width)
      index.forEach((row, i) => {
        if (row >= 0 && row < rows) y.set(x.subarray(row * width, (row + 1) * width), i * width)
      })
      const handle = backend.upload(x, [rows, width], dtype)
      const at = backend.upload(index, [n], 'i32')
      const values = [
        { handle, shape: [rows, width], dtype },
        { handle: at, shape: [n], dtype: 'i32' },
      ] as const
      const spec = { shape: [n, width], dtype }
      const [taken] = backend.primitives.takeRows(values, {}, [spec])
      expect(await backend.download({ handle: taken, ...spec })).toEqual(y)
      backend.dispose()
    },
  )
})
