/** @file Numbers of several ranks to one, always in the order of ranks. */
import { type DType, fromBf16, type HostArray, MoeError, toBf16 } from '@moe/core'
import type { Reduction } from './communicator.ts'

/** @throws MoeError E_DTYPE for what cannot be reduced */
export function checkReduction(op: string, dtype: DType, reduction: Reduction): void {
  if (dtype === 'f32' || dtype === 'bf16' || (dtype === 'i32' && reduction !== 'mean')) return
  throw new MoeError({
    code: 'E_DTYPE',
    op,
    problem: `there is no ${reduction} of ${dtype} over ranks`,
    fix: 'f32, bf16 and i32 have a sum and a largest, f32 and bf16 a mean; cast first',
  })
}

/** Element by element over `parts`, in f64, rounded once. */
export function reduce(dtype: DType, parts: readonly HostArray[], reduction: Reduction): HostArray {
  const decoded = dtype === 'bf16' ? parts.map(part => Float32Array.from(part, fromBf16)) : parts
  const result = reduction === 'max' ? largest(decoded) : sum(decoded, reduction === 'mean' ? decoded.length : 1)
  return dtype === 'bf16' ? Uint16Array.from(result, toBf16) : result
}

/** An array of the kind and length of the parts. */
const like = (parts: readonly HostArray[]) => new (parts[0].constructor as Float32ArrayConstructor)(parts[0].length)

function sum(parts: readonly HostArray[], divisor: number): HostArray {
  const result = like(parts)
  for (let i = 0; i < result.length; i++) {
    let total = 0
    for (const part of parts) total += part[i]
    result[i] = total / divisor
  }
  return result
}

function largest(parts: readonly HostArray[]): HostArray {
  const result = like(parts)
  for (let i = 0; i < result.length; i++) {
    let most = parts[0][i]
    // Of a NaN and a number, the NaN.
    for (const part of parts) most = Math.max(most, part[i])
    result[i] = most
  }
  return result
}
