/** @file Tensor maps, which describe matrices to Hopper's copy engine; kernels take them as parameters by value. */
import type { Driver } from './driver/driver.ts'

/** A CUtensorMap, an opaque structure of this many words, aligned as in cuda.h since CUDA 13. */
export type TensorMap = Uint32Array
export const mapWords = 32
export const mapAlignment = 128

/** Matrices `[matrices, rows, columns]`, copied in boxes of some rows and 128 bytes of columns. */
export interface BoxedMatrices {
  readonly pointer: number
  readonly columns: number
  readonly rows: number
  readonly matrices: number
  /** Elements per row including padding: a multiple of 16 bytes. */
  readonly ld: number
  /** 1 for f8e4m3, 2 for bf16. Default: 2. */
  readonly elementBytes?: 1 | 2
  /** Rows per box, at most 256. */
  readonly boxRows: number
}

/** Bytes per row of a box: the width of the widest swizzle. */
const boxBytes = 128

/** Columns of a bf16 box. */
export const boxColumns = boxBytes / 2

/** Values of the CUtensorMap* enumerations. */
export const encoding = {
  uint8: 0,
  bfloat16: 9,
  noInterleave: 0,
  swizzle128Bytes: 3,
  promoteTo256Bytes: 3,
  fillWithZeros: 0,
} as const

/** Creates tensor maps. Each is a copy, because the launch may come later. */
export function tensorMaps(driver: Driver): (matrices: BoxedMatrices) => TensorMap {
  const room = new ArrayBuffer(mapWords * 4 + mapAlignment)
  const start = driver.address(room)
  const map = Math.ceil(start / mapAlignment) * mapAlignment
  const words = new Uint32Array(room, map - start, mapWords)
  const sizes = new BigUint64Array(3)
  const strides = new BigUint64Array(2)
  const box = Uint32Array.of(0, 0, 1)
  const elementStrides = Uint32Array.of(1, 1, 1)
  return ({ pointer, columns, rows, matrices, ld, elementBytes = 2, boxRows }) => {
    sizes[0] = BigInt(columns)
    sizes[1] = BigInt(rows)
    sizes[2] = BigInt(matrices)
    strides[0] = BigInt(ld * elementBytes)
    strides[1] = BigInt(rows * ld * elementBytes)
    box[0] = boxBytes / elementBytes
    box[1] = boxRows
    const code = driver.call.cuTensorMapEncodeTiled(
      map,
      elementBytes === 1 ? encoding.uint8 : encoding.bfloat16,
      3,
      pointer,
      sizes,
      strides,
      box,
      elementStrides,
      encoding.noInterleave,
      encoding.swizzle128Bytes,
      encoding.promoteTo256Bytes,
      encoding.fillWithZeros,
    )
    driver.check(code, 'kernels-cuda', `describing matrices ${matrices} x ${rows} x ${columns} to the copy engine`)
    return words.slice()
  }
}
