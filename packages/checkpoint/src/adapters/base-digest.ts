/** @file Which base adapters were made for. */
import { createHash } from 'node:crypto'
import type { StateEntry } from '@moe/core'
import { fromF32, toF32 } from '../to-f32.ts'

/**
 * A digest of what a model is without its adapters: names and shapes of all that it stores, and the numbers of the vectors (scales of norms, selection biases), which no two trained models
 * share and which are never stored in fewer bits. They are rounded to bf16, so that it does not matter in which dtype the base was stored.
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
