/** @file Reductions over ranks on the host, always in the order of ranks. */
import { type DType, decodeHost, type HostArray, MoeError, toBf16 } from '@moe/core'
import type { Reduction } from './communicator.ts'

/** @throws MoeError E_DTYPE if the dtype does not support the reduction */
export function checkReduction(op: string, dtype: DType, reduction: Reduction): void {
  if (dtype === 'f32' || dtype === 'bf16' || (dtype === 'i32' && reduction !== 'mean')) return
  throw new MoeError({
    code: 'E_DTYPE',
    op,
    problem: `unsupported reduction: ${reduction} of ${dtype}`,
    fix: 'cast to f32; sum and max support f32, bf16 and i32, mean supports f32 and bf16',
  })
}

/** Elements reduced at a time: the totals stay in the cache. */
const block = 4096

/** Sets `to` to the elementwise reduction of `parts`, computed in f64 and rounded once (bf16 through f32). `to` may be one of the parts. */
export function reduce(to: HostArray, parts: readonly HostArray[], dtype: DType, reduction: Reduction): void {
  if (dtype === 'bf16') {
    const result = new Float32Array(to.length)
    reduceNumbers(
      result,
      parts.map(part => decodeHost('bf16', part)),
      reduction,
    )
    for (let i = 0; i < to.length; i++) to[i] = toBf16(result[i])
  } else reduceNumbers(to, parts, reduction)
}

function reduceNumbers(to: HostArray, parts: readonly HostArray[], reduction: Reduction): void {
  // Two ranks, the most common case, need no array of f64 totals: the one addition is rounded when it is stored.
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

/** Math.max propagates NaN. */
function largest(totals: Float64Array, part: HostArray): void {
  for (let i = 0; i < part.length; i++) totals[i] = Math.max(totals[i], part[i])
}
