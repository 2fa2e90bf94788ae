/** @file Metadata values of GGUF: typed numbers, strings, booleans, and arrays. */

/** Number types. 64-bit integers are read as bigint; for writing, numbers are accepted too. */
export type GgufNumberType = 'u8' | 'i8' | 'u16' | 'i16' | 'u32' | 'i32' | 'u64' | 'i64' | 'f32' | 'f64'

/** An array whose elements all have one type; arrays can be nested. */
export type GgufArray =
  | { readonly type: 'array'; readonly of: 'string'; readonly value: readonly string[] }
  | { readonly type: 'array'; readonly of: 'bool'; readonly value: readonly boolean[] }
  | { readonly type: 'array'; readonly of: 'array'; readonly value: readonly GgufArray[] }
  | { readonly type: 'array'; readonly of: GgufNumberType; readonly value: ArrayLike<number | bigint> }

/** A metadata value with its type in the file. */
export type GgufValue =
  | { readonly type: GgufNumberType; readonly value: number | bigint }
  | { readonly type: 'string'; readonly value: string }
  | { readonly type: 'bool'; readonly value: boolean }
  | GgufArray

export type GgufValueType = GgufValue['type']

/** Type ids in the file (ggml docs/gguf.md, `gguf_metadata_value_type`). */
export const typeIds: Readonly<Record<GgufValueType, number>> = {
  u8: 0,
  i8: 1,
  u16: 2,
  i16: 3,
  u32: 4,
  i32: 5,
  f32: 6,
  bool: 7,
  string: 8,
  array: 9,
  u64: 10,
  i64: 11,
  f64: 12,
}

const typesById = new Map(Object.entries(typeIds).map(([type, id]) => [id, type as GgufValueType]))

/** The type with an id, or undefined if it is unknown. */
export const valueTypeOfId = (id: number): GgufValueType | undefined => typesById.get(id)

export interface NumberFormat {
  readonly bytes: number
  /** Range of an integer type; undefined for floats. */
  readonly range?: readonly [bigint, bigint]
  put(view: DataView, at: number, value: number | bigint): void
  get(view: DataView, at: number): number | bigint
}

const integer = (bits: number, signed: boolean): Pick<NumberFormat, 'bytes' | 'range'> => ({
  bytes: bits / 8,
  range: signed ? [-(1n << BigInt(bits - 1)), (1n << BigInt(bits - 1)) - 1n] : [0n, (1n << BigInt(bits)) - 1n],
})

/** How each number type is stored, little-endian. */
export const numbers: Readonly<Record<GgufNumberType, NumberFormat>> = {
  u8: { ...integer(8, false), put: (v, at, x) => v.setUint8(at, Number(x)), get: (v, at) => v.getUint8(at) },
  i8: { ...integer(8, true), put: (v, at, x) => v.setInt8(at, Number(x)), get: (v, at) => v.getInt8(at) },
  u16: {
    ...integer(16, false),
    put: (v, at, x) => v.setUint16(at, Number(x), true),
    get: (v, at) => v.getUint16(at, true),
  },
  i16: {
    ...integer(16, true),
    put: (v, at, x) => v.setInt16(at, Number(x), true),
    get: (v, at) => v.getInt16(at, true),
  },
  u32: {
    ...integer(32, false),
    put: (v, at, x) => v.setUint32(at, Number(x), true),
    get: (v, at) => v.getUint32(at, true),
  },
  i32: {
    ...integer(32, true),
    put: (v, at, x) => v.setInt32(at, Number(x), true),
    get: (v, at) => v.getInt32(at, true),
  },
  u64: {
    ...integer(64, false),
    put: (v, at, x) => v.setBigUint64(at, BigInt(x), true),
    get: (v, at) => v.getBigUint64(at, true),
  },
  i64: {
    ...integer(64, true),
    put: (v, at, x) => v.setBigInt64(at, BigInt(x), true),
    get: (v, at) => v.getBigInt64(at, true),
  },
  f32: { bytes: 4, put: (v, at, x) => v.setFloat32(at, Number(x), true), get: (v, at) => v.getFloat32(at, true) },
  f64: { bytes: 8, put: (v, at, x) => v.setFloat64(at, Number(x), true), get: (v, at) => v.getFloat64(at, true) },
}

export const isNumberType = (type: string): type is GgufNumberType => Object.hasOwn(numbers, type)
