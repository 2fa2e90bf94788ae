/** @file Combines the experts' outputs per token, forward and backward. */
import { type FusedFactory, pointerOf } from '../../native.ts'
import { rowSlices } from '../permute-tokens/row-slices.ts'

export const combineTokens: FusedFactory<'combineTokens'> = cuda => {
  const kernel = cuda.kernel('combine-tokens', 'moe_combine_tokens_fwd_f32', 'p p p p l i i')
  return ([y, weights, , positions], _attrs, [spec]) => {
    const out = cuda.output(spec)
    const [N, K] = weights.shape
    const D = y.shape[1]
    kernel(rowSlices(N, D), out.pointer, pointerOf(y), pointerOf(weights), pointerOf(positions), N, K, D)
    return [out]
  }
}

export const combineTokensBackward: FusedFactory<'combineTokensBackward'> = cuda => {
  const kernel = cuda.kernel('combine-tokens', 'moe_combine_tokens_bwd_f32', 'p p p p p p l i i')
  return ([y, weights, , positions, dout], _attrs, [dySpec, dweightsSpec]) => {
    const dy = cuda.output(dySpec)
    const dweights = cuda.output(dweightsSpec)
    const [N, K] = weights.shape
    const inputs = [pointerOf(y), pointerOf(weights), pointerOf(positions), pointerOf(dout)]
    // The dot products need whole rows.
    const launch = { grid: Math.ceil((N * K) / 8), block: 256 }
    kernel(launch, dy.pointer, dweights.pointer, ...inputs, N * K, K, y.shape[1])
    return [dy, dweights]
  }
}
