/** @file Keys and values of latent attention. */
import { type Cuda, elementwiseGrid, type FusedFactory, pointerOf } from '../../native.ts'

/** Both directions: two outputs, two inputs, `positions` and `heads`, and the sizes of a head's parts. */
function kernelOf(cuda: Cuda, direction: 'fwd' | 'bwd') {
  const load = (name: string) => cuda.kernel('mla-key-value', name, 'p p p p l i i i i')
  const single = load(`moe_mla_key_value_${direction}_f32`)
  const by4 = load(`moe_mla_key_value_${direction}_f32_by4`)
  return (pointers: readonly number[], positions: number, heads: number, parts: readonly number[]) => {
    const isFours = parts.every(part => part % 4 === 0)
    const rows = positions * heads
    const grid = elementwiseGrid(cuda, rows * parts.reduce((sum, part) => sum + part, 0) * (isFours ? 1 : 4))
    ;(isFours ? by4 : single)({ grid, block: 256 }, ...pointers, rows, heads, ...parts)
  }
}

export const mlaKeyValue: FusedFactory<'mlaKeyValue'> = cuda => {
  const kernel = kernelOf(cuda, 'fwd')
  return ([kv, ropeKey], { nope }, [kSpec, vSpec]) => {
    const k = cuda.output(kSpec)
    const v = cuda.output(vSpec)
    const [batch, keys, heads, features] = kv.shape
    const pointers = [k.pointer, v.pointer, pointerOf(kv), pointerOf(ropeKey)]
    kernel(pointers, batch * keys, heads, [nope, ropeKey.shape[3], features - nope])
    return [k, v]
  }
}

export const mlaKeyValueBackward: FusedFactory<'mlaKeyValueBackward'> = cuda => {
  const kernel = kernelOf(cuda, 'bwd')
  return ([dk, dv], { nope }, [dkvSpec, dropeKeySpec]) => {
    if (dk.shape[2] === 0) return undefined
    const dkv = cuda.output(dkvSpec)
    const dropeKey = cuda.output(dropeKeySpec)
    const [batch, keys, heads, features] = dk.shape
    const pointers = [dkv.pointer, dropeKey.pointer, pointerOf(dk), pointerOf(dv)]
    kernel(pointers, batch * keys, heads, [nope, features - nope, dv.shape[3]])
    return [dkv, dropeKey]
  }
}
