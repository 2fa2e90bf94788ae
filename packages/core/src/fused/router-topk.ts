/**
 * @file The choice of experts: affinities, selection bias, group limit, top-k and gates (DeepSeek-V3 report eq. 12-16,
 * 2.1.2; V2 report 2.2).
 */
import { needDtype, needShape } from '../checks.ts'
import { arange, full } from '../create.ts'
import { MoeError } from '../errors.ts'
import type { RouterAttrs } from '../ops.ts'
import { scatterAddRows, where } from '../primitives.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'
import { softmax } from './softmax.ts'

function checkAttrs(experts: number, attrs: RouterAttrs): void {
  const { groups, topGroups, topK } = attrs
  const problems: string[] = []
  if (!Number.isInteger(groups) || groups < 1 || experts % groups !== 0) {
    problems.push(`groups = ${groups} does not divide ${experts} experts`)
  }
  if (!(Number.isInteger(topGroups) && topGroups >= 1 && topGroups <= groups))
    problems.push(`topGroups = ${topGroups} is not in 1..${groups}`)
  const reachable = (experts / groups) * topGroups
  if (!(Number.isInteger(topK) && topK >= 1 && topK <= reachable))
    problems.push(`topK = ${topK} is not in 1..${reachable} (the experts of the kept groups)`)
  if (problems.length > 0) {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'routerTopk',
      problem: problems.join('; '),
      details: { experts, ...attrs },
    })
  }
}

/** Flat positions of `indices [N, K]` in `[N, E]`. */
function flatIndex(indices: Tensor, experts: number): Tensor {
  const rows = indices.shape[0]
  return indices.add(arange(rows, indices).mul(experts).reshape([rows, 1]))
}

export const routerTopkDefinition: FusedDefinition<'routerTopk'> = {
  name: 'routerTopk',
  infer([logits, bias], attrs) {
    needDtype('routerTopk', 'logits', logits, 'f32')
    needDtype('routerTopk', 'bias', bias, 'f32')
    needShape('routerTopk', 'logits', logits, [-1, -1], 'reshape them to [N, E]')
    const [rows, experts] = logits.shape
    needShape('routerTopk', 'bias', bias, [experts])
    checkAttrs(experts, attrs)
    return [
      { shape: [rows, attrs.topK], dtype: 'f32' },
      { shape: [rows, attrs.topK], dtype: 'i32' },
      { shape: [rows, experts], dtype: 'f32' },
    ]
  },
  decompose([logits, bias], { scoring, groups, topGroups, groupScore, topK, normalize, scale }) {
    const [rows, experts] = logits.shape
    const scores = scoring === 'sigmoid' ? logits.sigmoid() : softmax(logits)
    let choice = scores.detach().add(bias.detach())
    if (topGroups < groups) {
      const size = experts / groups
      const grouped = choice.reshape([rows, groups, size])
      const best = groupScore === 'top2' ? grouped.topk(Math.min(2, size)).values.sum(-1) : grouped.max(-1)
      const kept = best.topk(topGroups).indices.reshape([rows, topGroups, 1])
      const isKept = kept
        .eq(arange(groups, kept).reshape([1, 1, groups]))
        .cast('i32')
        .sum(1)
        .reshape([rows, groups, 1])
      choice = where(isKept.eq(1), grouped, full([], Number.NEGATIVE_INFINITY, grouped)).reshape([rows, experts])
    }
    const { indices } = choice.topk(topK)
    const chosen = scores.reshape([rows * experts]).takeRows(flatIndex(indices, experts))
    const weights = normalize ? chosen.div(chosen.sum(-1, true).add(1e-20)) : chosen
    return [weights.mul(scale), indices, scores]
  },
  vjp({ outputs: [weights, indices, scores], attrs }, [dweights, , dscores]) {
    if (dweights === null && dscores === null) return [null, null]
    const inputs = [
      scores,
      indices,
      dweights ?? full(weights.shape, 0, weights),
      dscores ?? full(scores.shape, 0, scores),
    ]
    return [runFused(routerTopkBackwardDefinition, inputs, attrs)[0], null]
  },
}

export const routerTopkBackwardDefinition: FusedDefinition<'routerTopkBackward'> = {
  name: 'routerTopkBackward',
  infer: ([scores]) => [scores],
  decompose([scores, indices, dweights, dscores], { scoring, normalize, scale }) {
    const [rows, experts] = scores.shape
    const flat = flatIndex(indices, experts)
    const scaled = dweights.mul(scale)
    let dchosen = scaled
    if (normalize) {
      const chosen = scores.reshape([rows * experts]).takeRows(flat)
      const total = chosen.sum(-1, true).add(1e-20)
      dchosen = scaled.sub(scaled.mul(chosen).sum(-1, true).div(total)).div(total)
    }
    const ds = dscores.add(scatterAddRows(flat, dchosen, rows * experts).reshape([rows, experts]))
    const weighted = ds.mul(scores)
    return [
      scoring === 'sigmoid' ? weighted.mul(scores.neg().add(1)) : weighted.sub(scores.mul(weighted.sum(-1, true))),
    ]
  },
  vjp: null,
}

/** The result of `routerTopk`. */
export interface Routing {
  /** Gate values `[N, K]`. */
  readonly weights: Tensor
  /** Chosen experts `i32 [N, K]`, highest score first. */
  readonly indices: Tensor
  /** Unbiased affinities `[N, E]`. */
  readonly scores: Tensor
}

/**
 * Chooses K of E experts for each of N tokens, from `logits [N, E]`. `bias [E]` affects only the choice; the gates come
 * from the unbiased affinities. Experts outside the kept groups are never chosen. Ties go to the lowest index.
 * Gradients flow only to the logits.
 * @throws MoeError E_ATTR if groups, topGroups and topK do not fit the number of experts
 */
export function routerTopk(logits: Tensor, bias: Tensor, attrs: RouterAttrs): Routing {
  const [weights, indices, scores] = runFused(routerTopkDefinition, [logits, bias], attrs)
  return { weights, indices, scores }
}
