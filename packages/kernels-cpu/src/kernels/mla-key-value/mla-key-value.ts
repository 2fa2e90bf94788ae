/** @file Keys and values of latent attention. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const mlaKeyValue: FusedFactory<'mlaKeyValue'> = native => {
  const kernel = native.kernel('moe_mla_key_value_fwd_f32')
  return ([kv, ropeKey], { nope }, [kSpec, vSpec]) => {
    const k = native.output(kSpec)
    const v = native.output(vSpec)
    const [batch, keys, heads, features] = kv.shape
    const sizes = [batch * keys, heads, nope, ropeKey.shape[3], features - nope]
    kernel(k.pointer, v.pointer, pointerOf(kv), pointerOf(ropeKey), ...sizes)
    return [k, v]
  }
}

export const mlaKeyValueBackward: FusedFactory<'mlaKeyValueBackward'> = native => {
  const kernel = native.kernel('moe_mla_key_value_bwd_f32')
  return ([dk, dv], { nope }, [dkvSpec, dropeKeySpec]) => {
    const dkv = native.output(dkvSpec)
    const dropeKey = native.output(dropeKeySpec)
    const [batch, keys, heads, features] = dk.shape
    const sizes = [batch * keys, heads, nope, features - nope, dv.shape[3]]
    kernel(dkv.pointer, dropeKey.pointer, pointerOf(dk), pointerOf(dv), ...sizes)
    return [dkv, dropeKey]
  }
}
