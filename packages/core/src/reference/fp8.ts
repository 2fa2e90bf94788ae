/** @file Rounding of operands for precision 'fp8', tile by tile, as `Precision` defines it. */
import { f8e4m3Max, fp8Tile, fromF8e4m3, toF8e4m3 } from '../dtype.ts'

/** Returns the exponent of a tile's scale: the smallest e >= -100 with largest <= 448 * 2^e. */
function scaleExponent(largest: number): number {
  let e = Math.max(-100, Math.floor(Math.log2(largest / f8e4m3Max)) - 1)
  while (largest > f8e4m3Max * 2 ** e) e++
  return e
}

/**
 * Returns a copy of a matrix, rounded along k, in the same layout: `outer` runs of k numbers each, with a stride of
 * `stepK` within a run and `stepOuter` between runs.
 * @internal
 */
export function roundOperand<A extends Float64Array | Float32Array>(
  x: A,
  { outer, k, stepOuter, stepK }: { outer: number; k: number; stepOuter: number; stepK: number },
): A {
  const out = x.slice() as A
  for (let o = 0; o < outer; o++) {
    for (let first = 0; first < k; first += fp8Tile) {
      const end = Math.min(k, first + fp8Tile)
      let largest = 0
      for (let i = first; i < end; i++) largest = Math.max(largest, Math.abs(x[o * stepOuter + i * stepK]))
      // Math.max propagates NaN, so a NaN makes `largest` NaN.
      const scale = Number.isFinite(largest) ? 2 ** scaleExponent(largest) : Number.NaN
      for (let i = first; i < end; i++) {
        const at = o * stepOuter + i * stepK
        out[at] = fromF8e4m3(toF8e4m3(x[at] / scale)) * scale
      }
    }
  }
  return out
}
