/** @file The index scores of sparse attention, without storing the products of the single heads. */
import type { Value } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

const sizesOf = (q: Value, keys: Value) => [...q.shape, keys.shape[1]]

export const indexScores: FusedFactory<'indexScores'> = native => {
  const forward = native.kernel('moe_index_scores_fwd_f32')
  return ([q, weights, keys, limits], { precision }, [spec]) => {
    const scores = native.output(spec)
    const addresses = [scores.pointer, pointerOf(q), pointerOf(weights), pointerOf(keys)]
    forward(...addresses, limits ? pointerOf(limits) : 0, ...sizesOf(q, keys), +(precision === 'bf16'))
    return [scores]
  }
}

export const indexScoresBackward: FusedFactory<'indexScoresBackward'> = native => {
  const backward = native.kernel('moe_index_scores_bwd_f32')
  return ([q, weights, keys, dscores, limits], { precision }, specs) => {
    const outputs = specs.map(native.output)
    const inputs = [q, weights, keys, dscores].map(pointerOf)
    const addresses = [...outputs.map(({ pointer }) => pointer), ...inputs, limits ? pointerOf(limits) : 0]
    backward(...addresses, ...sizesOf(q, keys), +(precision === 'bf16'))
    return outputs
  }
}
