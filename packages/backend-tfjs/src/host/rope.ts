/** @file Rotary embedding in one pass over host memory. */
import type { FusedAttrs, TensorSpec, Value } from '@moe/core'
import { f32Of, type Host } from './memory.ts'

export function rope(
  host: Host,
  [x, cosTable, sinTable, plainOf]: readonly Value[],
  { interleaved, inverse }: FusedAttrs['rope'],
  [spec]: readonly TensorSpec[],
) {
  const out = host.output(spec.shape, 'float32')
  const to = host.view(out) as Float32Array
  const [from, cos, sin, plain] = [x, cosTable, sinTable, plainOf ?? x].map(value => f32Of(host, value))
  const [batch, time, heads, features] = x.shape
  const rank = cosTable.shape.length
  const half = cosTable.shape[rank - 1]
  const all = spec.shape[3]
  const first = all - 2 * half
  const perPlain = plainOf ? first : features
  const sign = inverse ? -1 : 1
  const [step, other] = interleaved ? [2, 1] : [1, half]
  for (let token = 0; token < batch * time; token++) {
    const table = (rank === 3 ? token : token % time) * half
    for (let h = 0; h < heads; h++) {
      const head = token * heads + h
      for (let j = 0; j < first; j++) to[head * all + j] = plain[head * perPlain + j]
      const [turned, given] = [head * all + first, (head + 1) * features - 2 * half]
      for (let i = 0, at = 0; i < half; i++, at += step) {
        const c = cos[table + i]
        const s = sin[table + i] * sign
        const a = from[given + at]
        const b = from[given + at + other]
        to[turned + at] = a * c - b * s
        to[turned + at + other] = b * c + a * s
      }
    }
  }
  return [out]
}
