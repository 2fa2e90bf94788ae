/** @file Keys and values of latent attention. */
import { type Cuda, elementwiseGrid, type FusedFactory, pointerOf } from '../../native.ts'

/** The forward or backward kernel for these head sizes, and whether it also rounds its outputs, to the addresses `rounded`. */
function kernelOf(cuda: Cuda, direction: 'fwd' | 'bwd', rounded: string) {
  const load = (name: string) => cuda.kernel('mla-key-value', name, `p p ${rounded} p p l i i i i`)
  const single = load(`moe_mla_key_value_${direction}_f32`)
  const by4 = load(`moe_mla_key_value_${direction}_f32_by4`)
  return (heads: number, parts: readonly number[]) => {
    const isFours = parts.every(part => part % 4 === 0)
    const launch = (pointers: readonly number[], positions: number) => {
      const rows = positions * heads
      const grid = elementwiseGrid(cuda, rows * parts.reduce((sum, part) => sum + part, 0) * (isFours ? 1 : 4))
      ;(isFours ? by4 : single)({ grid, block: 256 }, ...pointers, rows, heads, ...parts)
    }
    return { isFours, launch }
  }
}

export const mlaKeyValue: FusedFactory<'mlaKeyValue'> = cuda => {
  const kernel = kernelOf(cuda, 'fwd', 'p p')
  return ([kv, ropeKey], { nope }, [kSpec, vSpec]) => {
    const k = cuda.output(kSpec)
    const v = cuda.output(vSpec)
    const [batch, keys, heads, features] = kv.shape
    const parts = [nope, ropeKey.shape[3], features - nope]
    const { isFours, launch } = kernel(heads, parts)
    const rounded = [k, v].map((x, i) => (isFours ? cuda.roundedBy(x, `${i} ${heads} ${parts}`) : 0))
    launch([k.pointer, v.pointer, ...rounded, pointerOf(kv), pointerOf(ropeKey)], batch * keys)
    return [k, v]
  }
}

export const mlaKeyValueBackward: FusedFactory<'mlaKeyValueBackward'> = cuda => {
  const kernel = kernelOf(cuda, 'bwd', 'p')
  return ([dk, dv], { nope }, [dkvSpec, dropeKeySpec]) => {
    if (dk.shape[2] === 0) return undefined
    const dkv = cuda.output(dkvSpec)
    const dropeKey = cuda.output(dropeKeySpec)
    const [batch, keys, heads, features] = dk.shape
    const parts = [nope, features - nope, dv.shape[3]]
    const { isFours, launch } = kernel(heads, parts)
    const rounded = isFours ? cuda.roundedBy(dkv, `${heads} ${parts}`) : 0
    launch([dkv.pointer, dropeKey.pointer, rounded, pointerOf(dk), pointerOf(dv)], batch * keys)
    return [dkv, dropeKey]
  }
}
