/** @file Routing: the choice of experts, forward and backward. */
import type { RouterAttrs, Value } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

function sizes({ shape: [N, E] }: Value, attrs: RouterAttrs): number[] {
  const { scoring, groups, topGroups, groupScore, topK, normalize, scale } = attrs
  return [N, E, topK, groups, topGroups, +(scoring === 'softmax'), +(groupScore === 'top2'), +normalize, scale]
}

export const routerTopk: FusedFactory<'routerTopk'> = native => {
  const kernel = native.kernel('moe_router_topk_fwd_f32')
  return ([logits, bias], attrs, specs) => {
    const [weights, indices, scores] = specs.map(native.output)
    const outputs = [weights.pointer, indices.pointer, scores.pointer]
    kernel(...outputs, pointerOf(logits), pointerOf(bias), ...sizes(logits, attrs))
    return [weights, indices, scores]
  }
}

export const routerTopkBackward: FusedFactory<'routerTopkBackward'> = native => {
  const kernel = native.kernel('moe_router_topk_bwd_f32')
  return (inputs, attrs, [spec]) => {
    const dlogits = native.output(spec)
    kernel(dlogits.pointer, ...inputs.map(pointerOf), ...sizes(inputs[0], attrs))
    return [dlogits]
  }
}
