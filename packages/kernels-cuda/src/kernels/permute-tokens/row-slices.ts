/** @file Launches of the kernels that give every warp a slice of a row. */
import type { LaunchShape } from '../../modules.ts'

/** Features of a slice, as row-slices.cuh has it. */
const rowSlice = 2048

export function rowSlices(rows: number, features: number): LaunchShape {
  return { grid: [Math.ceil(rows / 8), Math.ceil(features / rowSlice)], block: 256 }
}
