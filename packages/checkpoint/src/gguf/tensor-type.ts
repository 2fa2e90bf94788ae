/** @file Element types of GGUF tensors: ids, block sizes and byte sizes (ggml.h `enum ggml_type`, ggml-common.h). */

/** Element types that {@link writeGguf} can write, with 32, 16, 16, 8.5 and 4.5 bits per weight. */
export type GgufEncoding = 'f32' | 'f16' | 'bf16' | 'q8_0' | 'q4_0'

/** Element types of known size. Those of {@link GgufEncoding} can also be decoded. */
export type GgufTensorType =
  | GgufEncoding
  | 'q4_1'
  | 'q5_0'
  | 'q5_1'
  | 'q2_k'
  | 'q3_k'
  | 'q4_k'
  | 'q5_k'
  | 'q6_k'
  | 'i8'
  | 'i16'
  | 'i32'
  | 'i64'
  | 'f64'

interface Layout {
  /** The type's number in the file. */
  readonly id: number
  /** Elements that are encoded together; rows consist of whole blocks. */
  readonly block: number
  /** Size of a block. */
  readonly bytes: number
}

const layouts: Readonly<Record<GgufTensorType, Layout>> = {
  f32: { id: 0, block: 1, bytes: 4 },
  f16: { id: 1, block: 1, bytes: 2 },
  q4_0: { id: 2, block: 32, bytes: 18 },
  q4_1: { id: 3, block: 32, bytes: 20 },
  q5_0: { id: 6, block: 32, bytes: 22 },
  q5_1: { id: 7, block: 32, bytes: 24 },
  q8_0: { id: 8, block: 32, bytes: 34 },
  q2_k: { id: 10, block: 256, bytes: 84 },
  q3_k: { id: 11, block: 256, bytes: 110 },
  q4_k: { id: 12, block: 256, bytes: 144 },
  q5_k: { id: 13, block: 256, bytes: 176 },
  q6_k: { id: 14, block: 256, bytes: 210 },
  i8: { id: 24, block: 1, bytes: 1 },
  i16: { id: 25, block: 1, bytes: 2 },
  i32: { id: 26, block: 1, bytes: 4 },
  i64: { id: 27, block: 1, bytes: 8 },
  f64: { id: 28, block: 1, bytes: 8 },
  bf16: { id: 30, block: 1, bytes: 2 },
}

const byId = new Map(Object.entries(layouts).map(([type, { id }]) => [id, type as GgufTensorType]))

/** The type with an id, or undefined if this package does not know it. */
export const tensorTypeOfId = (id: number): GgufTensorType | undefined => byId.get(id)

/** The id and block layout of a type. */
export const layoutOf = (type: GgufTensorType): Layout => layouts[type]

/**
 * The size of a tensor in bytes.
 *
 * @param shape row-major; the last size is the row length
 * @returns NaN if rows are not whole blocks, or the size is not below 2^53
 */
export function tensorBytes(type: GgufTensorType, shape: readonly number[]): number {
  const { block, bytes } = layouts[type]
  if ((shape.at(-1) ?? 1) % block !== 0) return Number.NaN
  const size = (shape.reduce((product, size) => product * size, 1) / block) * bytes
  return Number.isSafeInteger(size) ? size : Number.NaN
}
