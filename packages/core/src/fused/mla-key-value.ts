/**
 * @file Keys and values of multi-head latent attention, from the output of its up-projection and the rope key that all
 * heads share.
 */
import { needDtype, shapeError } from '../checks.ts'
import { zeros } from '../create.ts'
import { concat } from '../primitives.ts'
import { showShape } from '../shape.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

export const mlaKeyValueDefinition: FusedDefinition<'mlaKeyValue'> = {
  name: 'mlaKeyValue',
  infer([kv, ropeKey], { nope }) {
    needDtype('mlaKeyValue', 'kv', kv, 'f32')
    needDtype('mlaKeyValue', 'ropeKey', ropeKey, 'f32')
    const [batch, keys, heads, features] = kv.shape
    const rope = ropeKey.shape[3]
    const fits =
      kv.rank === 4 &&
      showShape(ropeKey.shape) === showShape([batch, keys, 1, rope]) &&
      Number.isInteger(nope) &&
      nope >= 0 &&
      nope <= features
    if (!fits) {
      throw shapeError(
        'mlaKeyValue',
        `kv ${showShape(kv.shape)}, ropeKey ${showShape(ropeKey.shape)}, nope ${nope}`,
        'pass kv [B,S,H,N+V], ropeKey [B,S,1,R] and nope N',
      )
    }
    const lead = [batch, keys, heads]
    return [
      { shape: [...lead, nope + rope], dtype: 'f32' },
      { shape: [...lead, features - nope], dtype: 'f32' },
    ]
  },
  decompose([kv, ropeKey], { nope }) {
    const [batch, keys, heads, features] = kv.shape
    const shared = ropeKey.expand([batch, keys, heads, ropeKey.shape[3]])
    return [concat([kv.narrow(3, 0, nope), shared], 3), kv.narrow(3, nope, features)]
  },
  vjp({ inputs: [kv, ropeKey], attrs }, [dk, dv]) {
    if (dk === null && dv === null) return [null, null]
    const [batch, keys, heads, features] = kv.shape
    const lead = [batch, keys, heads]
    const gradients = [
      dk ?? zeros([...lead, attrs.nope + ropeKey.shape[3]], kv),
      dv ?? zeros([...lead, features - attrs.nope], kv),
    ]
    return runFused(mlaKeyValueBackwardDefinition, gradients, attrs)
  },
}

export const mlaKeyValueBackwardDefinition: FusedDefinition<'mlaKeyValueBackward'> = {
  name: 'mlaKeyValueBackward',
  infer([dk, dv], { nope }) {
    const [batch, keys, heads, features] = dk.shape
    return [
      { shape: [batch, keys, heads, nope + dv.shape[3]], dtype: 'f32' },
      { shape: [batch, keys, 1, features - nope], dtype: 'f32' },
    ]
  },
  decompose([dk, dv], { nope }) {
    return [concat([dk.narrow(3, 0, nope), dv], 3), dk.narrow(3, nope, dk.shape[3]).sum(2, true)]
  },
  vjp: null,
}

/**
 * Returns the keys `[B, S, H, N + R]` and values `[B, S, H, V]` of all heads (DeepSeek-V2 report eq. 15-17).
 * @param kv output of `kv_b_proj`, `[B, S, H, N + V]`
 * @param ropeKey the rotated key that all heads share, `[B, S, 1, R]`
 * @param nope N
 * @throws MoeError E_SHAPE
 */
export function mlaKeyValue(kv: Tensor, ropeKey: Tensor, nope: number): { k: Tensor; v: Tensor } {
  const [k, v] = runFused(mlaKeyValueDefinition, [kv, ropeKey], { nope })
  return { k, v }
}
