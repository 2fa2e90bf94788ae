/** @file For tests: compares ops on the device with their decompositions on the reference backend, values and gradients. */
import { Random, type Tensor } from '@moe/core'
import { type HostInput, type OpResult, compareWithReference as onBackend, type Tolerance } from '@moe/core/testing'
import { testBackend } from './test-backend.ts'

/** `compareWithReference` of `@moe/core/testing` on a new device. */
export async function compareWithReference(
  inputs: readonly HostInput[],
  op: (...inputs: Tensor[]) => Tensor[],
  tolerance?: Tolerance,
): Promise<OpResult> {
  const backend = await testBackend()
  try {
    return await onBackend(backend, inputs, op, tolerance)
  } finally {
    backend.dispose()
  }
}

/** Normally distributed numbers. */
export function normal(shape: readonly number[], factor = 1): HostInput {
  const size = shape.reduce((product, n) => product * n, 1)
  const random = new Random(3).fork(shape.join()).normal(size)
  return { data: factor === 1 ? random : random.map(x => x * factor), shape }
}
