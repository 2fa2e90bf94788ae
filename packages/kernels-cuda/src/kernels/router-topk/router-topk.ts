/** @file Routing: the choice of experts, forward and backward. */
import type { RouterAttrs, Value } from '@moe/core'
import { type Cuda, type FusedFactory, pointerOf } from '../../native.ts'

const tokensPerBlock = 4
/** The lanes of a warp share the groups, and each holds one choice. */
const mostGroups = 32
const mostChoices = 32

type Launch = (pointers: readonly number[], scores: Value, attrs: RouterAttrs) => void

/** The kernel for this many experts; undefined if there are too many. */
function router(cuda: Cuda, name: string): (experts: number) => Launch | undefined {
  const variants = [128, 256, 512].map(most => {
    const kernel = cuda.kernel('router-topk', `${name}_e${most}`, 'p p p p p l i i i i i i i f')
    const launch: Launch = (pointers, { shape: [N, E] }, attrs) => {
      const { scoring, groups, topGroups, groupScore, topK, normalize, scale } = attrs
      const flags = [+(scoring === 'softmax'), +(groupScore === 'top2'), +normalize]
      const grid = Math.ceil(N / tokensPerBlock)
      kernel({ grid, block: tokensPerBlock * 32 }, ...pointers, N, E, topK, groups, topGroups, ...flags, scale)
    }
    return { most, launch }
  })
  return experts => variants.find(({ most }) => experts <= most)?.launch
}

export const routerTopk: FusedFactory<'routerTopk'> = cuda => {
  const forward = router(cuda, 'moe_router_topk_fwd_f32')
  return ([logits, bias], attrs, specs) => {
    const launch = forward(logits.shape[1])
    const isLimited = attrs.topGroups < attrs.groups
    if (launch === undefined || attrs.topK > mostChoices || (isLimited && attrs.groups > mostGroups)) return undefined
    const [weights, indices, scores] = specs.map(cuda.output)
    const outputs = [weights.pointer, indices.pointer, scores.pointer]
    launch([...outputs, pointerOf(logits), pointerOf(bias)], logits, attrs)
    return [weights, indices, scores]
  }
}

export const routerTopkBackward: FusedFactory<'routerTopkBackward'> = cuda => {
  const backward = router(cuda, 'moe_router_topk_bwd_f32')
  return (inputs, attrs, [spec]) => {
    const launch = backward(inputs[0].shape[1])
    if (launch === undefined) return undefined
    const dlogits = cuda.output(spec)
    launch([dlogits.pointer, ...inputs.map(pointerOf)], inputs[0], attrs)
    return [dlogits]
  }
}
