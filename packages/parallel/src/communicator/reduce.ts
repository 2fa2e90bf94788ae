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

/** Numbers that are added up at a time: they stay in the cache. */
const block = 4096

/** Element by element over `parts`, in f64, rounded once. */
export function reduce(dtype: DType, parts: readonly HostArray[], reduction: Reduction): HostArray {
  const decoded = dtype === 'bf16' ? parts.map(part => Float32Array.from(part, fromBf16)) : parts
  const [first, second] = decoded
  const result = first.slice()
  if (decoded.length === 2 && reduction !== 'max') addPair(result, second, reduction === 'mean' ? 2 : 1)
  else reduceBlocks(result, decoded, reduction)
  return dtype === 'bf16' ? Uint16Array.from(result, toBf16) : result
}

/** Two ranks, the most frequent number, need no sums of their own: what is stored is rounded once. */
function addPair(to: HostArray, other: HostArray, divisor: number): void {
  for (let i = 0; i < other.length; i++) to[i] = (to[i] + other[i]) / divisor
}

function reduceBlocks(result: HostArray, parts: readonly HostArray[], reduction: Reduction): void {
  const [first, ...others] = parts
  const totals = new Float64Array(block)
  for (let from = 0; from < first.length; from += block) {
    const part = (of: HostArray) => of.subarray(from, from + block)
    totals.set(part(first))
    for (const other of others) (reduction === 'max' ? largest : add)(totals, part(other))
    if (reduction === 'mean') for (let i = 0; i < block; i++) totals[i] /= parts.length
    result.set(totals.subarray(0, first.length - from), from)
  }
}

function add(totals: Float64Array, part: HostArray): void {
  for (let i = 0; i < part.length; i++) totals[i] += part[i]
}

/** Of a NaN and a number, the NaN. */
function largest(totals: Float64Array, part: HostArray): void {
  for (let i = 0; i < part.length; i++) totals[i] = Math.max(totals[i], part[i])
}
