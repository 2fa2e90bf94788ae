/** @file Units in which elements are moved: 1, 2, 4, 8 or 16 bytes, with a kernel for each. */
import type { CudaKernel } from '../../modules.ts'
import type { Cuda } from '../../native.ts'

const units = [1, 2, 4, 8, 16]

/** The largest unit that divides all of these byte counts. */
export function unitOf(...bytes: readonly number[]): number {
  let bits = 16
  for (let i = 0; i < bytes.length; i++) bits |= bytes[i] % 16
  // The lowest bit set in any of them.
  return bits & -bits
}

/** The variants `<name>_b8` to `<name>_b128` of a kernel, by unit size in bytes. */
export function byUnit(cuda: Cuda, module: string, name: string, signature: string): (unit: number) => CudaKernel {
  const kernels = units.map(unit => cuda.kernel(module, `${name}_b${unit * 8}`, signature))
  return unit => kernels[31 - Math.clz32(unit)]
}
