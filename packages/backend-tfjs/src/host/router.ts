/** @file Routing in one pass over host memory. All intermediate values are rounded to f32, as in the decomposition. */
import type { RouterAttrs, TensorSpec, Value } from '@moe/core'
import { f32Of, type Host } from './memory.ts'
import { selectLargest } from './reduce.ts'

function affinities(
  scoring: RouterAttrs['scoring'],
  logits: Float32Array,
  scores: Float32Array,
  experts: number,
): void {
  if (scoring === 'sigmoid') {
    for (let i = 0; i < scores.length; i++) scores[i] = 1 / (1 + Math.exp(-logits[i]))
    return
  }
  for (let row = 0; row < scores.length; row += experts) {
    let largest = Number.NEGATIVE_INFINITY
    for (let i = row; i < row + experts; i++) if (logits[i] > largest || logits[i] !== logits[i]) largest = logits[i]
    const shift = largest === Number.NEGATIVE_INFINITY ? 0 : largest
    let sum = 0
    for (let i = row; i < row + experts; i++) sum += Math.exp(logits[i] - shift)
    for (let i = row; i < row + experts; i++) scores[i] = Math.exp(logits[i] - shift) / Math.max(sum, 1e-37)
  }
}

export function routerTopk(
  host: Host,
  [logits, bias]: readonly Value[],
  attrs: RouterAttrs,
  specs: readonly TensorSpec[],
) {
  const { scoring, groups, topGroups, groupScore, topK, normalize, scale } = attrs
  const [rows, experts] = logits.shape
  const outputs = [
    host.output(specs[0].shape, 'float32'),
    host.output(specs[1].shape, 'int32'),
    host.output(specs[2].shape, 'float32'),
  ]
  const [weights, indices, scores] = outputs.map(tensor => host.view(tensor)) as [
    Float32Array,
    Int32Array,
    Float32Array,
  ]
  affinities(scoring, f32Of(host, logits), scores, experts)
  const offset = f32Of(host, bias)
  const choice = new Float32Array(experts)
  const size = experts / groups
  const best = new Float32Array(groups)
  const pair = new Int32Array(2)
  const kept = new Int32Array(topGroups)
  for (let n = 0; n < rows; n++) {
    for (let e = 0; e < experts; e++) choice[e] = scores[n * experts + e] + offset[e]
    if (topGroups < groups) {
      const summed = groupScore === 'top2' ? Math.min(2, size) : 1
      for (let g = 0; g < groups; g++) {
        selectLargest(choice, g * size, size, summed, pair, 0)
        best[g] = choice[g * size + pair[0]] + (summed === 2 ? choice[g * size + pair[1]] : 0)
      }
      selectLargest(best, 0, groups, topGroups, kept, 0)
      for (let g = 0; g < groups; g++) {
        if (!kept.includes(g)) choice.fill(Number.NEGATIVE_INFINITY, g * size, (g + 1) * size)
      }
    }
    selectLargest(choice, 0, experts, topK, indices, n * topK)
    let sum = 0
    for (let i = n * topK; i < (n + 1) * topK; i++) sum += scores[n * experts + indices[i]]
    const factor = normalize ? scale / (sum + 1e-20) : scale
    for (let i = n * topK; i < (n + 1) * topK; i++) weights[i] = scores[n * experts + indices[i]] * factor
  }
  return outputs
}
