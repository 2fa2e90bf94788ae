/** @file Combines the experts' outputs per token, forward and backward. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const combineTokens: FusedFactory<'combineTokens'> = native => {
  const kernel = native.kernel('moe_combine_tokens_fwd_f32')
  return ([y, weights, , positions], _attrs, [spec]) => {
    const out = native.output(spec)
    const [N, K] = weights.shape
    kernel(out.pointer, pointerOf(y), pointerOf(weights), pointerOf(positions), N, K, y.shape[1])
    return [out]
  }
}

export const combineTokensBackward: FusedFactory<'combineTokensBackward'> = native => {
  const kernel = native.kernel('moe_combine_tokens_bwd_f32')
  return ([y, weights, , positions, dout], _attrs, [dySpec, dweightsSpec]) => {
    const dy = native.output(dySpec)
    const dweights = native.output(dweightsSpec)
    const [N, K] = weights.shape
    const [py, pw, pp, pd] = [pointerOf(y), pointerOf(weights), pointerOf(positions), pointerOf(dout)]
    kernel(dy.pointer, dweights.pointer, py, pw, pp, pd, N, K, y.shape[1])
    return [dy, dweights]
  }
}
