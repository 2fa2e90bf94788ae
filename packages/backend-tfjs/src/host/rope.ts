/** @file Rotary embedding in one pass over host memory. */
import type { FusedAttrs, TensorSpec, Value } from '@moe/core'
import { f32Of, type Host } from './memory.ts'

export function rope(
  host: Host,
  [x, cosTable, sinTable]: readonly Value[],
  { interleaved, inverse }: FusedAttrs['rope'],
  [spec]: readonly TensorSpec[],
) {
  const out = host.output(spec.shape, 'float32')
  const to = host.view(out) as Float32Array
  const [from, cos, sin] = [x, cosTable, sinTable].map(value => f32Of(host, value))
  const [batch, time, heads, features] = x.shape
  const rank = cosTable.shape.length
  const half = cosTable.shape[rank - 1]
  const plain = features - 2 * half
  const sign = inverse ? -1 : 1
  const [step, other] = interleaved ? [2, 1] : [1, half]
  for (let token = 0; token < batch * time; token++) {
    const table = (rank === 3 ? token : token % time) * half
    for (let h = 0; h < heads; h++) {
      const row = (token * heads + h) * features
      for (let j = 0; j < plain; j++) to[row + j] = from[row + j]
      for (let i = 0, at = row + plain; i < half; i++, at += step) {
        const c = cos[table + i]
        const s = sin[table + i] * sign
        const a = from[at]
        const b = from[at + other]
        to[at] = a * c - b * s
        to[at + other] = b * c + a * s
      }
    }
  }
  return [out]
}
