import { type DType, decodeHost, dtypes, encodeHost, hostArray, Random } from '@moe/core'
import { expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

const { NaN: nan, POSITIVE_INFINITY: inf } = Number
const special = [0, -0, 1, -1.9, 2.5, 255.9, 300, 448, 464, 465, 500, -448, 65504, 65520, 3e9, -3e9, inf, -inf, nan]
const small = [2 ** -6, 2 ** -7, 2 ** -10, 3 * 2 ** -10, 2 ** -14, 2 ** -25, 3 * 2 ** -25, 1e-40, 2 ** -24]

function saturated(values: ArrayLike<number>, low: number, high: number): number[] {
  return Array.from(values, x => (Number.isNaN(x) ? 0 : Math.min(high, Math.max(low, Math.trunc(x)))) + 0)
}

test.skipIf(unavailable).each(dtypes.flatMap(from => dtypes.filter(to => to !== from).map(to => [from, to] as const)))(
  'casts %s to %s',
  async (from, to) => {
    const backend = await testBackend()
    const random = new Random(1)
    const values = [
      ...special,
      ...small,
      ...[0.01, 1, 100].flatMap(scale => [...random.normal(50)].map(x => x * scale)),
    ]
    const integer = from === 'i32' || from === 'u8'
    const x = encodeHost(from, integer ? saturated(values, -(2 ** 31), 2 ** 31 - 1) : values)
    const numbers = Float32Array.from(decodeHost(from, x))
    const shape = [x.length]
    const expected: Readonly<Record<DType, () => ArrayLike<number>>> = {
      f32: () => numbers,
      bf16: () => encodeHost('bf16', numbers),
      f16: () => encodeHost('f16', numbers),
      f8e4m3: () => encodeHost('f8e4m3', numbers),
      i32: () => Int32Array.from(saturated(numbers, -(2 ** 31), 2 ** 31 - 1)),
      u8: () => Uint8Array.from(saturated(numbers, 0, 255)),
    }
    const handle = backend.upload(x, shape, from)
    const [y] = backend.primitives.cast([{ handle, shape, dtype: from }], { dtype: to }, [{ shape, dtype: to }])
    const result = await backend.download({ handle: y, shape, dtype: to })
    backend.dispose()
    // Compared as numbers, because NaN has many bit patterns.
    const wanted = hostArray(to, x.length)
    wanted.set(Array.from(expected[to]()))
    expect([...decodeHost(to, result)]).toEqual([...decodeHost(to, wanted)])
  },
)
