/** @file Reductions, cumulative sums and top-k on host memory. f32 sums are accumulated in f64. */
import { type PrimitiveAttrs, type Shape, sizeOf, type TensorSpec, type Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { type Elements, elementsOf, f32Of, type Host, tfDType } from './memory.ts'
import { broadcastStrides, positions } from './strided.ts'

/** Merges adjacent axes of the same kind. Returns `[outer, reduced, inner]` if that is possible, else null. */
function asThreeAxes(shape: Shape, axes: readonly number[]): [number, number, number] | null {
  const first = axes[0]
  const last = axes[axes.length - 1]
  if (last - first + 1 !== axes.length) return null
  return [sizeOf(shape.slice(0, first)), sizeOf(shape.slice(first, last + 1)), sizeOf(shape.slice(last + 1))]
}

export function reduce(
  host: Host,
  [x]: readonly Value[],
  { code, axes }: PrimitiveAttrs['reduce'],
  [spec]: readonly TensorSpec[],
): TfTensor[] {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const to = host.view(out)
  const from = elementsOf(host, x)
  const three = asThreeAxes(x.shape, axes)
  const start = code === 'sum' ? 0 : spec.dtype === 'i32' ? -(2 ** 31) : Number.NEGATIVE_INFINITY
  const sums = new Float64Array(three === null ? to.length : three[2]).fill(start)
  if (three === null) {
    const at = positions(x.shape, broadcastStrides(spec.shape, x.shape))
    fold(code, from, 0, from.length, sums, i => at[i])
    to.set(sums)
  } else if (three[2] === 1) {
    reduceRows(code, from, to, three[1], start)
  } else {
    const [outer, size, inner] = three
    for (let o = 0; o < outer; o++) {
      sums.fill(start)
      for (let i = 0; i < size; i++) {
        const row = (o * size + i) * inner
        if (code === 'sum') for (let j = 0; j < inner; j++) sums[j] += from[row + j]
        else for (let j = 0; j < inner; j++) sums[j] = larger(sums[j], from[row + j])
      }
      to.set(sums, o * inner)
    }
  }
  return [out]
}

const larger = (a: number, b: number): number => (a > b || a !== a ? a : b)

function fold(
  code: 'sum' | 'max',
  from: Elements,
  start: number,
  end: number,
  into: Float64Array,
  at: (i: number) => number,
) {
  for (let i = start; i < end; i++) {
    const j = at(i)
    into[j] = code === 'sum' ? into[j] + from[i] : larger(into[j], from[i])
  }
}

function reduceRows(code: 'sum' | 'max', from: Elements, to: Elements, size: number, start: number): void {
  for (let row = 0, at = 0; row < to.length; row++) {
    let total = start
    if (code === 'sum') for (let i = 0; i < size; i++) total += from[at++]
    else for (let i = 0; i < size; i++) total = larger(total, from[at++])
    to[row] = total
  }
}

export function cumsum(
  host: Host,
  [x]: readonly Value[],
  { axis }: PrimitiveAttrs['cumsum'],
  [spec]: readonly TensorSpec[],
) {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const to = host.view(out)
  const from = elementsOf(host, x)
  const size = x.shape[axis]
  const inner = sizeOf(x.shape.slice(axis + 1))
  const outer = sizeOf(x.shape.slice(0, axis))
  for (let o = 0; o < outer; o++) {
    for (let j = 0; j < inner; j++) {
      let total = 0
      for (let i = 0, at = o * size * inner + j; i < size; i++, at += inner) {
        total += from[at]
        to[at] = total
      }
    }
  }
  return [out]
}

/**
 * Finds the `k` largest of `size` keys from `start` on, largest first, with ties and NaN (as -Infinity) ordered as the contract requires. Writes positions relative to
 * `start` into `chosen`, from `at` on.
 */
export function selectLargest(
  keys: ArrayLike<number>,
  start: number,
  size: number,
  k: number,
  chosen: Int32Array,
  at: number,
): void {
  // Insertion into a sorted list: k is small, and an equal key never passes an earlier one.
  let count = 0
  for (let i = 0; i < size; i++) {
    const raw = keys[start + i]
    const key = raw !== raw ? Number.NEGATIVE_INFINITY : raw
    let place = count
    while (place > 0 && key > keyAt(keys, start + chosen[at + place - 1])) place--
    if (place >= k) continue
    if (count < k) count++
    for (let j = count - 1; j > place; j--) chosen[at + j] = chosen[at + j - 1]
    chosen[at + place] = i
  }
}

function keyAt(keys: ArrayLike<number>, i: number): number {
  const key = keys[i]
  return key !== key ? Number.NEGATIVE_INFINITY : key
}

export function topk(host: Host, [x]: readonly Value[], { k }: PrimitiveAttrs['topk'], specs: readonly TensorSpec[]) {
  const values = host.output(specs[0].shape, 'float32')
  const indices = host.output(specs[1].shape, 'int32')
  const from = f32Of(host, x)
  const [best, chosen] = [host.view(values), host.view(indices) as Int32Array]
  const size = x.shape[x.shape.length - 1]
  const rows = chosen.length / k
  for (let row = 0; row < rows; row++) {
    selectLargest(from, row * size, size, k, chosen, row * k)
    for (let i = row * k; i < (row + 1) * k; i++) best[i] = from[row * size + chosen[i]]
  }
  return [values, indices]
}
