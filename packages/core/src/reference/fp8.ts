/** @file Operands of precision 'fp8': what `Precision` says, one tile after the other. */
import { f8e4m3Max, fp8Tile, fromF8e4m3, toF8e4m3 } from '../dtype.ts'

/** Exponent of the tile's scale: the least one from -100 on with largest <= 448 * 2^e. */
function scaleExponent(largest: number): number {
  let e = Math.max(-100, Math.floor(Math.log2(largest / f8e4m3Max)) - 1)
  while (largest > f8e4m3Max * 2 ** e) e++
  return e
}

/**
 * A matrix rounded along k: `outer` runs of k numbers, the numbers of a run `stepK` apart and the runs `stepOuter`. Returns a copy that lies the same way.
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
      // Math.max keeps NaN.
      const scale = Number.isFinite(largest) ? 2 ** scaleExponent(largest) : Number.NaN
      for (let i = first; i < end; i++) {
        const at = o * stepOuter + i * stepK
        out[at] = fromF8e4m3(toF8e4m3(x[at] / scale)) * scale
      }
    }
  }
  return out
}
