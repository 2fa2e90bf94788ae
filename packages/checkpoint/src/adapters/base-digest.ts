/** @file A digest that identifies the base model of adapters. */
import { createHash } from 'node:crypto'
import type { StateEntry } from '@moe/core'
import { fromF32, toF32 } from '../to-f32.ts'

/**
 * Returns a digest of a model without its adapters: the names and shapes of all stored tensors, and the values of the vectors (norm
 * scales, balance biases). Vectors differ between any two trained models and are never quantized. They are rounded to bf16, so that the
 * digest does not depend on the dtype in which the base model was stored.
 */
export async function baseDigest(entries: readonly StateEntry[]): Promise<string> {
  const hash = createHash('sha256')
  for (const { name, dtype, shape, data } of entries) {
    hash.update(`${name} ${shape.join('x')}\n`)
    const values = shape.length === 1 ? toF32(dtype, await data()) : undefined
    if (values !== undefined) hash.update(fromF32('bf16', values))
  }
  return hash.digest('hex').slice(0, 32)
}
