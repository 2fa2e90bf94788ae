import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  type DType,
  decodeHost,
  dtypeBytes,
  dtypes,
  encodeHost,
  f8e4m3Max,
  fromBf16,
  fromF8e4m3,
  fromF16,
  hostArray,
  isFloat,
  toBf16,
  toF8e4m3,
  toF16,
  viewBytes,
} from './dtype.ts'

interface Codec {
  readonly encode: (value: number) => number
  readonly decode: (bits: number) => number
  readonly codes: number
  /** Bits of known values, in both directions. */
  readonly golden: ReadonlyArray<readonly [value: number, bits: number]>
  /** Values that must be rounded, and the expected bits. */
  readonly rounded: ReadonlyArray<readonly [value: number, bits: number]>
}

const codecs: Record<string, Codec> = {
  bf16: {
    encode: toBf16,
    decode: fromBf16,
    codes: 65536,
    golden: [
      [0, 0],
      [-0, 0x8000],
      [1, 0x3f80],
      [-2, 0xc000],
      [3.140625, 0x4049],
      [2 ** -126, 0x0080],
      [2 ** -133, 0x0001],
      [3.3895313892515355e38, 0x7f7f],
      [Number.POSITIVE_INFINITY, 0x7f80],
      [Number.NEGATIVE_INFINITY, 0xff80],
    ],
    rounded: [
      [0.1, 0x3dcd],
      [Math.PI, 0x4049],
      // Ties go to the even code, and everything above them up.
      [1 + 2 ** -8, 0x3f80],
      [1 + 3 * 2 ** -8, 0x3f82],
      [1 + 2 ** -8 + 2 ** -20, 0x3f81],
      // The carry goes through the exponent and, at the end, into infinity.
      [2 - 2 ** -9, 0x4000],
      [3.4028234663852886e38, 0x7f80],
      [2 ** -134, 0],
      [3 * 2 ** -134, 0x0002],
    ],
  },
  f16: {
    encode: toF16,
    decode: fromF16,
    codes: 65536,
    golden: [
      [0, 0],
      [-0, 0x8000],
      [1, 0x3c00],
      [-2, 0xc000],
      [3.140625, 0x4248],
      [65504, 0x7bff],
      [2 ** -14, 0x0400],
      [2 ** -14 - 2 ** -24, 0x03ff],
      [2 ** -24, 0x0001],
      [Number.POSITIVE_INFINITY, 0x7c00],
      [Number.NEGATIVE_INFINITY, 0xfc00],
    ],
    rounded: [
      [0.1, 0x2e66],
      [1 / 3, 0x3555],
      [Math.PI, 0x4248],
      [1 + 2 ** -11, 0x3c00],
      [1 + 3 * 2 ** -11, 0x3c02],
      [1 + 2 ** -11 + 2 ** -20, 0x3c01],
      [65519, 0x7bff],
      [65520, 0x7c00],
      [-1e9, 0xfc00],
      [2 ** -25, 0],
      [3 * 2 ** -25, 0x0002],
      [2 ** -14 - 2 ** -25, 0x0400],
    ],
  },
  f8e4m3: {
    encode: toF8e4m3,
    decode: fromF8e4m3,
    codes: 256,
    golden: [
      [0, 0],
      [-0, 0x80],
      [1, 0x38],
      [1.125, 0x39],
      [-2, 0xc0],
      [2 ** -9, 0x01],
      [7 * 2 ** -9, 0x07],
      [2 ** -6, 0x08],
      [448, 0x7e],
      [-448, 0xfe],
    ],
    rounded: [
      [0.1, 0x1d],
      [17, 0x58],
      [19, 0x5a],
      [2 ** -10, 0],
      [3 * 2 ** -10, 0x02],
      [7.5 * 2 ** -9, 0x08],
      // There is no infinity: values that are too large become the largest number.
      [449, 0x7e],
      [1e30, 0x7e],
      [Number.POSITIVE_INFINITY, 0x7e],
      [Number.NEGATIVE_INFINITY, 0xfe],
    ],
  },
}

for (const [name, { encode, decode, codes, golden, rounded }] of Object.entries(codecs)) {
  describe(name, () => {
    const half = codes / 2

    test('encodes and decodes known bit patterns', () => {
      for (const [value, bits] of golden) {
        expect(encode(value), `bits of ${value}`).toBe(bits)
        expect(decode(bits), `value of 0x${bits.toString(16)}`).toBe(value)
      }
      for (const [value, bits] of rounded) expect(encode(value), `bits of ${value}`).toBe(bits)
    })

    test('every code survives a round trip, and NaN stays NaN', () => {
      const wrong: number[] = []
      let nans = 0
      for (let code = 0; code < codes; code++) {
        const value = decode(code)
        if (Number.isNaN(value)) {
          nans++
          if (!Number.isNaN(decode(encode(value)))) wrong.push(code)
        } else if (encode(value) !== code) wrong.push(code)
      }
      expect(wrong).toEqual([])
      expect(nans).toBe({ bf16: 2 * 127, f16: 2 * 1023, f8e4m3: 2 }[name])
    })

    test('positive codes are in the order of their values, negative ones mirror them', () => {
      for (let code = 1; code < half && !Number.isNaN(decode(code)); code++) {
        if (!(decode(code) > decode(code - 1))) expect.fail(`code ${code} is not above ${code - 1}`)
        if (decode(code + half) !== -decode(code)) expect.fail(`code ${code + half} is not the negative of ${code}`)
      }
    })

    test('rounds to the nearest, ties to the even code', () => {
      const finite: number[] = []
      for (let code = 0; code < half && Number.isFinite(decode(code)); code++) finite.push(decode(code))
      const largest = finite[finite.length - 1]
      const magnitudes = fc.oneof(
        fc.float({ min: 0, max: Math.fround(largest), noNaN: true }),
        // Exactly between two neighbours, if f32 can represent that.
        fc.integer({ min: 0, max: finite.length - 2 }).map(i => Math.fround((finite[i] + finite[i + 1]) / 2)),
      )
      fc.assert(
        fc.property(magnitudes, fc.boolean(), (magnitude, negative) => {
          const code = encode(negative ? -magnitude : magnitude)
          if (negative !== code >= half) return false
          const at = code % half
          const error = Math.abs(finite[at] - magnitude)
          const below = at === 0 ? Number.POSITIVE_INFINITY : Math.abs(finite[at - 1] - magnitude)
          const above = at === finite.length - 1 ? Number.POSITIVE_INFINITY : Math.abs(finite[at + 1] - magnitude)
          const tied = error === below || error === above
          return error <= below && error <= above && (!tied || at % 2 === 0)
        }),
        { numRuns: 3000, seed: 1 },
      )
    })
  })
}

describe('host arrays', () => {
  const arrays: Record<DType, unknown> = {
    f32: Float32Array,
    bf16: Uint16Array,
    f16: Uint16Array,
    f8e4m3: Uint8Array,
    i32: Int32Array,
    u8: Uint8Array,
  }

  test('every dtype has an array of its size', () => {
    for (const dtype of dtypes) {
      const array = hostArray(dtype, 3)
      expect(array).toBeInstanceOf(arrays[dtype])
      expect(array.byteLength).toBe(3 * dtypeBytes[dtype])
      expect(isFloat(dtype)).toBe(dtype !== 'i32' && dtype !== 'u8')
    }
  })

  test('encode and decode are inverse on numbers that every dtype has', () => {
    for (const dtype of dtypes) {
      const data = encodeHost(dtype, [0, 1, 2, 96, 112])
      expect(data).toBeInstanceOf(arrays[dtype])
      expect(Array.from(decodeHost(dtype, data))).toEqual([0, 1, 2, 96, 112])
    }
  })

  test('integers are truncated toward zero, u8 is clamped', () => {
    expect(encodeHost('i32', [1.9, -1.9, 0])).toEqual(Int32Array.of(1, -1, 0))
    expect(encodeHost('u8', [-3, 300, 7.9, Number.NaN])).toEqual(Uint8Array.of(0, 255, 7, 0))
  })

  test('f8e4m3 saturates at its largest number', () => {
    expect(Array.from(decodeHost('f8e4m3', encodeHost('f8e4m3', [1e9, -1e9])))).toEqual([f8e4m3Max, -f8e4m3Max])
  })

  test('bytes are viewed in place when they are aligned, else copied', () => {
    const bytes = new Uint8Array(12)
    new DataView(bytes.buffer).setFloat32(4, 1.5, true)
    const aligned = viewBytes('f32', bytes.subarray(4, 8))
    expect(Array.from(aligned)).toEqual([1.5])
    expect(aligned.buffer).toBe(bytes.buffer)
    const moved = new Uint8Array(13)
    moved.set(bytes, 1)
    const copied = viewBytes('f32', moved.subarray(5, 9))
    expect(Array.from(copied)).toEqual([1.5])
    expect(copied.buffer).not.toBe(moved.buffer)
    for (const dtype of dtypes) expect(viewBytes(dtype, new Uint8Array(8))).toBeInstanceOf(arrays[dtype])
  })
})
