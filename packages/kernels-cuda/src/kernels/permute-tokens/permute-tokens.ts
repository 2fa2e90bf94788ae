/** @file Permutes tokens into expert order, forward and backward. */
import { type FusedFactory, pointerOf } from '../../native.ts'
import { rowSlices } from './row-slices.ts'

export const permuteTokens: FusedFactory<'permuteTokens'> = cuda => {
  const kernel = cuda.kernel('permute-tokens', 'moe_permute_tokens_fwd_f32', 'p p p l i l i')
  return ([x, order], { topK }, [spec]) => {
    const y = cuda.output(spec)
    const [slots, D] = spec.shape
    kernel(rowSlices(slots, D), y.pointer, pointerOf(x), pointerOf(order), slots, topK, x.shape[0], D)
    return [y]
  }
}

export const permuteTokensBackward: FusedFactory<'permuteTokensBackward'> = cuda => {
  const kernel = cuda.kernel('permute-tokens', 'moe_permute_tokens_bwd_f32', 'p p p l i i')
  return ([dy, positions], { topK }, [spec]) => {
    const dx = cuda.output(spec)
    const [N, D] = spec.shape
    kernel(rowSlices(N, D), dx.pointer, pointerOf(dy), pointerOf(positions), N, topK, D)
    return [dx]
  }
}
