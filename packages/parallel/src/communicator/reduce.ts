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

/** `to` becomes `parts`, element by element, in f64 and rounded once (bf16 by f32). It may be one of them. */
export function reduce(to: HostArray, parts: readonly HostArray[], dtype: DType, reduction: Reduction): void {
  if (dtype === 'bf16') {
    const result = new Float32Array(to.length)
    reduceNumbers(
      result,
      parts.map(part => Float32Array.from(part, fromBf16)),
      reduction,
    )
    for (let i = 0; i < to.length; i++) to[i] = toBf16(result[i])
  } else reduceNumbers(to, parts, reduction)
}

function reduceNumbers(to: HostArray, parts: readonly HostArray[], reduction: Reduction): void {
  // Two ranks, the most frequent number, need no sums of their own: what is stored is rounded once.
  if (parts.length === 2 && reduction !== 'max') addPair(to, parts[0], parts[1], reduction === 'mean' ? 2 : 1)
  else reduceBlocks(to, parts, reduction)
}

function addPair(to: HostArray, a: HostArray, b: HostArray, divisor: number): void {
  for (let i = 0; i < to.length; i++) to[i] = (a[i] + b[i]) / divisor
}

function reduceBlocks(to: HostArray, parts: readonly HostArray[], reduction: Reduction): void {
  const [first, ...others] = parts
  const totals = new Float64Array(block)
  for (let from = 0; from < to.length; from += block) {
    const part = (of: HostArray) => of.subarray(from, from + block)
    totals.set(part(first))
    for (const other of others) (reduction === 'max' ? largest : add)(totals, part(other))
    if (reduction === 'mean') for (let i = 0; i < block; i++) totals[i] /= parts.length
    to.set(totals.subarray(0, to.length - from), from)
  }
}

function add(totals: Float64Array, part: HostArray): void {
  for (let i = 0; i < part.length; i++) totals[i] += part[i]
}

/** Of a NaN and a number, the NaN. */
function largest(totals: Float64Array, part: HostArray): void {
  for (let i = 0; i < part.length; i++) totals[i] = Math.max(totals[i], part[i])
}
