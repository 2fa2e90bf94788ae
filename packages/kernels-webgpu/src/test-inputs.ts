/** @file For tests: inputs of ops. */
import { Random } from '@moe/core'
import type { HostInput } from '@moe/core/testing'

/** Normally distributed numbers. */
export function normal(shape: readonly number[], factor = 1): HostInput {
  const size = shape.reduce((product, n) => product * n, 1)
  const random = new Random(3).fork(shape.join()).normal(size)
  return { data: random.map(x => x * factor), shape }
}

/** The given integers. */
export const integers = (data: readonly number[], shape: readonly number[] = [data.length]): HostInput => {
  return { data, shape, dtype: 'i32' }
}
