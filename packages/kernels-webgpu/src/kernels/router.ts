/** @file Routing, with a team of threads per token: affinities, bias, groups, the best experts, their weights. E experts, K of them chosen. */
import type { FusedAttrs, FusedKernel, RouterAttrs } from '@moe/core'
import { type Program, word } from '../commands.ts'
import { bufferOf, type DeviceOps } from '../device-ops.ts'
import { exponential, special } from './math.ts'
import { eachRow, largest, TEAM } from './teams.ts'

/** Maximum number of experts: workgroup memory holds two numbers per expert. */
const MOST_EXPERTS = 1024

/**
 * An expert is chosen if fewer than K rank before it: larger, or equal with a lower index. The same holds for groups. With NaN as -Infinity this is a total order.
 * Words: 0 tokens, 1 E, 2 groups, 3 kept groups, 4 K, 5 scale, 6 whether to normalize weights, 7 softmax, 8 groups ranked by their maximum.
 */
const chosen: Program = {
  label: 'routerTopk',
  buffers: ['logits f32', 'bias f32', 'weights* f32', 'indices* i32', 'scores* f32'],
  body: eachRow(
    `${special}${exponential}${largest}
var<workgroup> affinities: array<f32, ${MOST_EXPERTS}>;
var<workgroup> choices: array<f32, ${MOST_EXPERTS}>;
var<workgroup> best: array<f32, ${MOST_EXPERTS}>;
fn number(x: f32) -> f32 { return select(x, -inf(), is_nan(x)); }
fn group_score(first: u32, end: u32, by_maximum: bool) -> f32 {
  var top = number(choices[first]);
  var second = -inf();
  var poisoned = is_nan(choices[first]);
  for (var e = first + 1u; e < end; e++) {
    let choice = number(choices[e]);
    poisoned = poisoned || is_nan(choices[e]);
    second = max(second, min(top, choice));
    top = max(top, choice);
  }
  if (by_maximum) { return select(top, -inf(), poisoned); }
  if (end - first == 1u) { return top; }
  return top + second;
}`,
    `
  let groups_ = p(2u);
  let kept = p(3u);
  let wanted = p(4u);
  let members = size / groups_;
  let softmax = p(7u) == 1u;
  var base = 0.0;
  var total = 1.0;
  if (softmax) {
    var own_top = -inf();
    for (var e = thread; e < size; e += ${TEAM}u) { own_top = max_(own_top, logits[start + e]); }
    let top = team_max(own_top, thread);
    base = select(top, 0.0, is_inf(top) && is_negative(top));
    var own_sum = 0.0;
    for (var e = thread; e < size; e += ${TEAM}u) { own_sum += exp_(logits[start + e] - base); }
    total = max_(team_sum(own_sum, thread), 1e-37);
  }
  for (var e = thread; e < size; e += ${TEAM}u) {
    var affinity = sigmoid_(logits[start + e]);
    if (softmax) { affinity = exp_(logits[start + e] - base) / total; }
    affinities[e] = affinity;
    scores[start + e] = affinity;
    choices[e] = affinity + bias[e];
  }
  workgroupBarrier();
  if (kept < groups_) {
    for (var g = thread; g < groups_; g += ${TEAM}u) { best[g] = group_score(g * members, (g + 1u) * members, p(8u) == 1u); }
    workgroupBarrier();
    for (var g = thread; g < groups_; g += ${TEAM}u) {
      var ahead = 0u;
      for (var other = 0u; other < groups_; other++) {
        ahead += u32(best[other] > best[g] || (best[other] == best[g] && other < g));
      }
      if (ahead >= kept) {
        for (var e = g * members; e < (g + 1u) * members; e++) { choices[e] = -inf(); }
      }
    }
    workgroupBarrier();
  }
  for (var e = thread; e < size; e += ${TEAM}u) {
    let choice = number(choices[e]);
    var ahead = 0u;
    for (var other = 0u; other < size; other++) {
      let its = number(choices[other]);
      ahead += u32(its > choice || (its == choice && other < e));
    }
    if (ahead < wanted) {
      indices[i * wanted + ahead] = i32(e);
      best[ahead] = affinities[e];
    }
  }
  workgroupBarrier();
  var sum = 0.0;
  for (var n = 0u; n < wanted; n++) { sum += best[n]; }
  let divisor = select(1.0, sum + 1e-20, p(6u) == 1u);
  for (var n = thread; n < wanted; n += ${TEAM}u) { weights[i * wanted + n] = best[n] / divisor * bitcast<f32>(p(5u)); }`,
  ),
}

const flagsOf = ({ normalize, scoring, groupScore }: RouterAttrs) =>
  [normalize, scoring === 'softmax', groupScore === 'max'].map(Number)

export const routerTopk =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['routerTopk']> =>
  ([logits, bias], attrs, specs) => {
    const { groups, topGroups, topK, scale } = attrs
    const [tokens, experts] = logits.shape
    if (experts > MOST_EXPERTS) return undefined
    const outputs = specs.map(spec => gpu.output('routerTopk', spec))
    const words = [tokens, experts, groups, topGroups, topK, word(scale), ...flagsOf(attrs)]
    gpu.launch(chosen, [bufferOf(logits), bufferOf(bias), ...outputs], words, [tokens])
    return outputs
  }

// Words: 0 tokens, 1 E, 2 K, 3 scale, 4 whether weights were normalized, 5 softmax.
const backward: Program = {
  label: 'routerTopkBackward',
  buffers: ['scores f32', 'indices i32', 'dweights f32', 'dscores f32', 'dlogits* f32'],
  body: eachRow(
    '',
    `
  let wanted = p(2u);
  let scale = bitcast<f32>(p(3u));
  let normalized = p(4u) == 1u;
  let softmax = p(5u) == 1u;
  var total = 1e-20;
  var dot = 0.0;
  for (var n = 0u; n < wanted; n++) {
    let score = scores[start + u32(indices[i * wanted + n])];
    total += score;
    dot += dweights[i * wanted + n] * scale * score;
  }
  var own = 0.0;
  for (var e = thread; e < size; e += ${TEAM}u) {
    var d = dscores[start + e];
    for (var n = 0u; n < wanted; n++) {
      if (u32(indices[i * wanted + n]) == e) {
        let scaled = dweights[i * wanted + n] * scale;
        d += select(scaled, (scaled - dot / total) / total, normalized);
      }
    }
    let score = scores[start + e];
    let weighted = d * score;
    own += weighted;
    dlogits[start + e] = select(weighted * (1.0 - score), weighted, softmax);
  }
  if (softmax) {
    let sum = team_sum(own, thread);
    for (var e = thread; e < size; e += ${TEAM}u) { dlogits[start + e] -= scores[start + e] * sum; }
  }`,
  ),
}

export const routerTopkBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['routerTopkBackward']> =>
  ([scores, indices, dweights, dscores], attrs, [spec]) => {
    const [tokens, experts] = scores.shape
    const dlogits = gpu.output('routerTopkBackward', spec)
    const buffers = [scores, indices, dweights, dscores].map(bufferOf)
    const words = [tokens, experts, attrs.topK, word(attrs.scale), ...flagsOf(attrs)]
    gpu.launch(backward, [...buffers, dlogits], words, [tokens])
    return [dlogits]
  }
