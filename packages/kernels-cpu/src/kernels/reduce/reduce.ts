/** @file Sums and maxima over any axes: a pass over [outer, count, inner] for every run of adjacent axes. */
import type { Shape } from '@moe/core'
import { type PrimitiveFactory, pointerOf } from '../../native.ts'

/** [outer, count, inner] of each pass, last axes first. */
export function reducePasses(shape: Shape, axes: readonly number[]): Array<[number, number, number]> {
  const passes: Array<[number, number, number]> = []
  let inner = 1
  let axis = shape.length - 1
  while (axis >= 0) {
    if (!axes.includes(axis)) {
      inner *= shape[axis--]
      continue
    }
    let count = 1
    // An axis of size 1 between two reduced axes does not separate them.
    while (axis >= 0 && (axes.includes(axis) || shape[axis] === 1)) count *= shape[axis--]
    let outer = 1
    for (let i = 0; i <= axis; i++) outer *= shape[i]
    passes.push([outer, count, inner])
  }
  return passes
}

export const reduce: PrimitiveFactory<'reduce'> = native => {
  const kernels = {
    sum: { f32: native.kernel('moe_reduce_sum_f32'), i32: native.kernel('moe_reduce_sum_i32') },
    max: { f32: native.kernel('moe_reduce_max_f32'), i32: native.kernel('moe_reduce_max_i32') },
  }
  return ([x], { code, axes }, [spec]) => {
    const kernel = kernels[code][spec.dtype as 'f32' | 'i32']
    const passes = reducePasses(x.shape, axes)
    const y = native.output(spec)
    let from = pointerOf(x)
    let between: ReturnType<typeof native.output> | undefined
    passes.forEach(([outer, count, inner], i) => {
      const last = i === passes.length - 1
      const to = last ? y : native.output({ shape: [outer, inner], dtype: spec.dtype })
      kernel(to.pointer, from, outer, count, inner)
      if (between !== undefined) native.release(between)
      between = last ? undefined : to
      from = to.pointer
    })
    return [y]
  }
}
