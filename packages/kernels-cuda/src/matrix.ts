/** @file Matrices in device memory, and the sizes of their products. */

/** A matrix in device memory with `ld` elements per row: f32, or bf16 with `ld` a multiple of 8 and zeros after each row. */
export interface Matrix {
  readonly pointer: number
  readonly ld: number
}

/** Sizes of c = a b: a is [m, k] ([k, m] if transposed), b is [k, n] ([n, k]), with `batch` contiguous matrices of each. */
export interface Product {
  readonly m: number
  readonly n: number
  readonly k: number
  readonly transposeA: boolean
  readonly transposeB: boolean
  readonly batch?: number
  /** Computes c += a b. */
  readonly add?: boolean
}
