/** @file Launches of kernels that assign a slice of a row to every warp. */
import type { LaunchShape } from '../../modules.ts'

/** Features per slice, as in row-slices.cuh. */
const rowSlice = 2048

export function rowSlices(rows: number, features: number): LaunchShape {
  return { grid: [Math.ceil(rows / 8), Math.ceil(features / rowSlice)], block: 256 }
}
