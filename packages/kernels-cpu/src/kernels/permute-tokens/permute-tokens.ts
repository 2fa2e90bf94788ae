/** @file Permutes tokens into expert order, forward and backward. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const permuteTokens: FusedFactory<'permuteTokens'> = native => {
  const kernel = native.kernel('moe_permute_tokens_fwd_f32')
  return ([x, order], { topK }, [spec]) => {
    const y = native.output(spec)
    kernel(y.pointer, pointerOf(x), pointerOf(order), spec.shape[0], topK, x.shape[0], x.shape[1])
    return [y]
  }
}

export const permuteTokensBackward: FusedFactory<'permuteTokensBackward'> = native => {
  const kernel = native.kernel('moe_permute_tokens_bwd_f32')
  return ([dy, positions], { topK }, [spec]) => {
    const dx = native.output(spec)
    kernel(dx.pointer, pointerOf(dy), pointerOf(positions), spec.shape[0], topK, spec.shape[1])
    return [dx]
  }
}
