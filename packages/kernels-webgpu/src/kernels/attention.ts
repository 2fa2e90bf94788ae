/**
 * @file Attention of few queries, as in decoding: a team of threads for each query and head goes over the keys with a running softmax, so that no scores are stored
 * (Milakov & Gimelshein 2018). More queries go by tiles, which read keys once for 32 of them.
 * B batch, T queries, S keys, H heads, G key/value heads.
 */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import { type Program, word } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps } from '../device-ops.ts'
import { attentionByTiles } from './attention-tiles.ts'
import { exponential, logarithm, special } from './math.ts'

const TEAM = 128
/** Largest sizes of a key and of a value. */
const MOST_KEY = 640
const MOST_VALUE = 512
/** Most queries of a sequence. */
const FEW_QUERIES = 16

interface Rows {
  readonly label: string
  readonly buffers: readonly string[]
  /** WGSL expressions of `b`, `t`, `head` and key `j`: where its features begin, and those of its value. */
  readonly key: string
  readonly value: string
  /** Names of the buffers of both. */
  readonly keys: string
  readonly values: string
  /** WGSL: sets `first` and `end`, the keys that the query sees. */
  readonly sees: string
  /** WGSL: stores what is known beside the output. */
  readonly also: string
}

// Words: 0 queries in all, 1 heads, 2 T, 3 S, 4 G, 5 features of a key, 6 of a value, 7 scale, then what the form needs.
const overRows = ({ label, buffers, key, value, keys, values, sees, also }: Rows): Program => ({
  label,
  buffers,
  body: `${special}${exponential}${logarithm}
var<workgroup> query: array<f32, ${MOST_KEY}>;
var<workgroup> parts: array<f32, ${TEAM}>;
var<workgroup> chances: array<f32, ${TEAM}>;
@compute @workgroup_size(${TEAM})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let i = group.y * groups.x + group.x;
  if (i >= p(0u)) { return; }
  let heads = p(1u);
  let head = i % heads;
  let t = i / heads % p(2u);
  let b = i / heads / p(2u);
  let width = p(5u);
  let value_width = p(6u);
  for (var f = thread; f < width; f += ${TEAM}u) { query[f] = q[i * width + f] * bitcast<f32>(p(7u)); }
  var first = 0;
  var end = 0;
  ${sees}
  var top = -inf();
  var total = 0.0;
  var sums: array<f32, ${MOST_VALUE / TEAM}>;
  for (var j0 = first; j0 < end; j0 += ${TEAM}) {
    workgroupBarrier();
    let j = u32(j0) + thread;
    let inside = i32(j) < end;
    var score = -inf();
    if (inside) {
      let at = ${key};
      score = 0.0;
      for (var f = 0u; f < width; f++) { score += query[f] * ${keys}[at + f]; }
    }
    parts[thread] = score;
    for (var step = ${TEAM / 2}u; step > 0u; step >>= 1u) {
      workgroupBarrier();
      if (thread < step) { parts[thread] = max_(parts[thread], parts[thread + step]); }
    }
    workgroupBarrier();
    let new_top = max_(top, parts[0]);
    let unseen = is_inf(new_top) && is_negative(new_top);
    let base = select(new_top, 0.0, unseen);
    let chance = select(0.0, exp_(score - base), inside);
    chances[thread] = chance;
    workgroupBarrier();
    parts[thread] = chance;
    for (var step = ${TEAM / 2}u; step > 0u; step >>= 1u) {
      workgroupBarrier();
      if (thread < step) { parts[thread] += parts[thread + step]; }
    }
    workgroupBarrier();
    let shrink = exp_(top - base);
    total = total * shrink + parts[0];
    top = new_top;
    let here = min(${TEAM}, end - j0);
    for (var n = 0u; n < ${MOST_VALUE / TEAM}u; n++) {
      let f = n * ${TEAM}u + thread;
      if (f < value_width) {
        var sum = sums[n] * shrink;
        for (var c = 0; c < here; c++) {
          let j = u32(j0 + c);
          sum += chances[c] * ${values}[${value} + f];
        }
        sums[n] = sum;
      }
    }
  }
  for (var n = 0u; n < ${MOST_VALUE / TEAM}u; n++) {
    let f = n * ${TEAM}u + thread;
    if (f < value_width) { y[i * value_width + f] = select(sums[n] / total, 0.0, total == 0.0); }
  }
  ${also}
}`,
})

// Word 8: causal, 9: whether there are lengths, 10: starts.
const ofHeads = overRows({
  label: 'attention',
  buffers: ['q f32', 'k f32', 'v f32', 'lengths i32', 'starts i32', 'y* f32', 'lse* f32'],
  keys: 'k',
  values: 'v',
  key: '((b * p(3u) + j) * p(4u) + head / (heads / p(4u))) * width',
  value: '((b * p(3u) + j) * p(4u) + head / (heads / p(4u))) * value_width',
  sees: `
  end = i32(p(3u));
  if (p(9u) == 1u) { end = min(end, lengths[b]); }
  if (p(8u) == 1u) {
    let limit = select(i32(p(3u)), lengths[b], p(9u) == 1u);
    end = min(end, limit - i32(p(2u)) + i32(t) + 1);
  }
  if (p(10u) == 1u) { first = max(0, starts[b * p(2u) + t]); }`,
  also: `
  if (thread == 0u) { lse[(b * heads + head) * p(2u) + t] = top + log_(total); }`,
})

export const attention =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['attention']> =>
  (inputs, attrs, specs) => {
    const [q, k, v, lengths, starts] = inputs
    const { causal, scale } = attrs
    const [spec, lseSpec] = specs
    const [, times, heads, width] = q.shape
    const [, keys, groups] = k.shape
    const valueWidth = v.shape[3]
    if (times > FEW_QUERIES) return attentionByTiles(gpu)(inputs, attrs, specs)
    if (width > MOST_KEY || valueWidth > MOST_VALUE || countOf(spec) === 0) return undefined
    const [y, lse] = [gpu.output('attention', spec), gpu.output('attention', lseSpec)]
    // What is not given is not read; a binding needs some buffer.
    const buffers = [q, k, v, lengths ?? q, starts ?? q].map(bufferOf)
    const flags = [causal, lengths !== undefined, starts !== undefined].map(Number)
    const count = countOf(lseSpec)
    const parameters = [count, heads, times, keys, groups, width, valueWidth, word(scale), ...flags]
    gpu.launch(ofHeads, [...buffers, y, lse], parameters, [count])
    return [y, lse]
  }

// Word 8: rows of a page, 9: pages of a sequence.
const latentRow = `(u32(pages[b * p(9u) + j / p(8u)]) * p(8u) + j % p(8u)) * width`
const sequenceRow = '(b * p(8u) + j) * width'

const ofLatents = (paged: boolean) =>
  overRows({
    label: paged ? 'latentAttention in pages' : 'latentAttention',
    buffers: ['q f32', 'cache f32', 'lengths i32', ...(paged ? ['pages i32'] : []), 'y* f32'],
    keys: 'cache',
    values: 'cache',
    key: paged ? latentRow : sequenceRow,
    value: paged ? latentRow : sequenceRow,
    sees: 'end = min(min(i32(p(3u)), lengths[b]), lengths[b] - i32(p(2u)) + i32(t) + 1);',
    also: '',
  })

export const latentAttention =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['latentAttention']> =>
  ([q, cache, lengths, pages], { scale, valueDim }, [spec]) => {
    const [batch, times, heads, width] = q.shape
    const [, size] = cache.shape
    const few = times <= FEW_QUERIES && width <= MOST_KEY && valueDim <= MOST_VALUE
    if (!few || countOf(spec) === 0 || countOf(cache) === 0) return undefined
    const y = gpu.output('latentAttention', spec)
    const count = batch * times * heads
    const perSequence = pages?.shape[1] ?? 1
    const parameters = [count, heads, times, size * perSequence, 1, width, valueDim, word(scale), size, perSequence]
    const buffers = [q, cache, lengths, ...(pages ? [pages] : [])].map(bufferOf)
    gpu.launch(ofLatents(pages !== undefined), [...buffers, y], parameters, [count])
    return [y]
  }
