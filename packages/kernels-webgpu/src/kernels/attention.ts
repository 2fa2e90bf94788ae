/**
 * @file Attention with few queries, as in decoding. A team of threads loops over the keys for four queries that share them, of one head or of several, with an online
 * softmax, so that no scores are stored (Milakov & Gimelshein 2018). If that gives few teams, the keys are split between teams (Dao and others 2023, Flash-Decoding).
 * More queries use tiles. B batch, T queries, S keys, H heads, G key/value heads.
 */
import type { FusedAttrs, FusedKernel, Handle, Value } from '@moe/core'
import { type Program, word } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps } from '../device-ops.ts'
import type { Buffer } from '../memory.ts'
import { attentionByTiles } from './attention-tiles.ts'
import { exponential, logarithm, special } from './math.ts'
import { areWide, quads, readQuad, repeat } from './quads.ts'
import { eachRow, TEAM } from './teams.ts'

/** Maximum number of features of a key and of a value. */
const MOST_KEY = 640
const MOST_VALUE = 4 * TEAM
/** Maximum number of queries per sequence. */
const FEW_QUERIES = 16
/** With fewer teams, keys are split; and the minimum number of keys per part. */
const FEW_TEAMS = 64
const LEAST_KEYS = 512

interface Rows {
  readonly label: string
  readonly buffers: readonly string[]
  /** WGSL expressions in `b`, `g` and key `j`: the offsets of its features and of its value's. */
  readonly key: string
  readonly value: string
  /** Buffer names of keys and values, and their element type. */
  readonly keys: string
  readonly values: string
  readonly dtype: 'f32' | 'bf16'
  readonly wide: boolean
  /** WGSL: sets `first` and `end`, the range of keys that query `t` sees. */
  readonly sees: string
  /** Whether to write log-sum-exps. */
  readonly lse: boolean
}

/**
 * Components of vectors are the four queries, except in vectors that are loaded. With several parts, y receives sums, and lse the largest score and the sum of exponentials,
 * per query and part.
 * Words: 0 teams, 1 H, 2 T, 3 S, 4 G, 5 features of a key, 6 of a value, 7 scale, 8 parts, then those of the variant.
 */
const overRows = ({ label, buffers, key, value, keys, values, dtype, wide, sees, lse }: Rows): Program => ({
  label: `${label} ${dtype} ${wide ? 'wide' : 'narrow'}`,
  buffers: ['q f32', ...buffers, 'y* f32', 'lse* f32'],
  body: `${special}${exponential}${logarithm}${[...new Set([keys, values])].map(name => readQuad(name, wide, dtype)).join('')}
var<workgroup> query: array<vec4<f32>, ${MOST_KEY}>;
var<workgroup> parts: array<vec4<f32>, ${TEAM}>;
var<workgroup> chances: array<vec4<f32>, ${TEAM}>;
fn exp4(x: vec4<f32>) -> vec4<f32> { return vec4<f32>(exp_(x.x), exp_(x.y), exp_(x.z), exp_(x.w)); }
@compute @workgroup_size(${TEAM})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let i = group.y * groups.x + group.x;
  if (i >= p(0u)) { return; }
  let heads = p(1u);
  let times = p(2u);
  let width = p(5u);
  let value_width = p(6u);
  let part = i % p(8u);
  let share = heads / p(4u);
  let pairs = times * share;
  let fours = (pairs + 3u) / 4u;
  let pair0 = i / p(8u) % fours * 4u;
  let g = i / p(8u) / fours % p(4u);
  let b = i / p(8u) / fours / p(4u);
  var rows = vec4<u32>();
  var firsts = vec4<i32>(2147483647);
  var ends = vec4<i32>();
  for (var c = 0u; c < 4u; c++) {
    if (pair0 + c < pairs) {
      let t = (pair0 + c) / share;
      var first = 0;
      var end = 0;
      ${sees}
      rows[c] = (b * times + t) * heads + g * share + (pair0 + c) % share;
      if (first < end) { firsts[c] = first; ends[c] = end; }
    }
  }
  for (var f = thread; f < width; f += ${TEAM}u) {
    query[f] = vec4<f32>(q[rows.x * width + f], q[rows.y * width + f], q[rows.z * width + f], q[rows.w * width + f]) * bitcast<f32>(p(7u));
  }
  let all_first = min(min(firsts.x, firsts.y), min(firsts.z, firsts.w));
  let all_end = max(max(ends.x, ends.y), max(ends.z, ends.w));
  let own_share = (max(0, all_end - all_first) + i32(p(8u)) - 1) / i32(p(8u));
  let own_first = all_first + i32(part) * own_share;
  let own_end = min(all_end, own_first + own_share);
  // Each thread has four features of a value; teams of as many threads as that takes share the keys.
  let quads = (value_width + 3u) / 4u;
  let teams = ${TEAM}u / quads;
  let team = thread / quads;
  let feature = thread % quads * 4u;
  var top = vec4<f32>(-3.0e38);
  var total = vec4<f32>();${repeat(
    4,
    c => `
  var sum${c} = vec4<f32>();`,
  )}
  for (var j0 = own_first; j0 < own_end; j0 += ${TEAM}) {
    workgroupBarrier();
    var score = vec4<f32>();
    let mine = j0 + i32(thread);
    if (mine < own_end) {
      let j = u32(mine);
      let at = ${key};
      for (var f = 0u; f < width; f += 4u) {
        let features = ${keys}4(at, f, width);
        score += query[f] * features.x + query[f + 1u] * features.y + query[f + 2u] * features.z + query[f + 3u] * features.w;
      }
    }
    let seen = (firsts <= vec4<i32>(mine)) & (vec4<i32>(mine) < ends) & vec4<bool>(mine < own_end);
    score = select(vec4<f32>(-3.0e38), score, seen);
    parts[thread] = score;
    for (var step = ${TEAM / 2}u; step > 0u; step >>= 1u) {
      workgroupBarrier();
      if (thread < step) { parts[thread] = max(parts[thread], parts[thread + step]); }
    }
    workgroupBarrier();
    let new_top = max(top, parts[0]);
    let chance = select(vec4<f32>(), exp4(score - new_top), seen);
    chances[thread] = chance;
    workgroupBarrier();
    let shrink = exp4(top - new_top);
    top = new_top;
    total = total * shrink + chance;${repeat(
      4,
      c => `
    sum${c} *= shrink[${c}];`,
    )}
    if (team < teams) {
      let here = u32(min(${TEAM}, own_end - j0));
      for (var n = team; n < here; n += teams) {
        let j = u32(j0) + n;
        let features = ${values}4(${value}, feature, value_width);
        let chance = chances[n];${repeat(
          4,
          c => `
        sum${c} += chance[${c}] * features;`,
        )}
      }
    }
  }
  parts[thread] = total;
  for (var step = ${TEAM / 2}u; step > 0u; step >>= 1u) {
    workgroupBarrier();
    if (thread < step) { parts[thread] += parts[thread + step]; }
  }
  workgroupBarrier();
  total = parts[0];
  var sums = array<vec4<f32>, 4>(sum0, sum1, sum2, sum3);
  for (var c = 0u; c < 4u; c++) {
    workgroupBarrier();
    chances[thread] = sums[c];
    workgroupBarrier();
    if (pair0 + c < pairs && thread < quads) {
      var sum = vec4<f32>();
      for (var n = 0u; n < teams; n++) { sum += chances[n * quads + thread]; }
      let row = rows[c] * p(8u) + part;
      if (p(8u) == 1u) { sum = select(sum / total[c], vec4<f32>(), total[c] == 0.0); }
      for (var n = 0u; n < 4u; n++) {
        if (feature + n < value_width) { y[row * value_width + feature + n] = sum[n]; }
      }
      if (thread == 0u && p(8u) > 1u) {
        lse[2u * row] = top[c];
        lse[2u * row + 1u] = total[c];
      }${
        lse
          ? `
      if (thread == 0u && p(8u) == 1u) {
        let t = (pair0 + c) / share;
        lse[(b * heads + rows[c] % heads) * times + t] = select(top[c] + log_(total[c]), -inf(), total[c] == 0.0);
      }`
          : ''
      }
    }
  }
}`,
})

/** Words: 0 queries, 1 features of a value, 2 parts, 3 H, 4 T, 5 whether to write log-sum-exps. */
const joined: Program = {
  label: 'attention in parts',
  buffers: ['sums f32', 'tops f32', 'y* f32', 'lse* f32'],
  body: eachRow(
    special + exponential + logarithm,
    `
  let parts_ = p(2u);
  var top = -3.0e38;
  for (var part = 0u; part < parts_; part++) { top = max(top, tops[2u * (i * parts_ + part)]); }
  var total = 0.0;
  for (var part = 0u; part < parts_; part++) {
    let at = 2u * (i * parts_ + part);
    total += tops[at + 1u] * exp_(tops[at] - top);
  }
  for (var f = thread; f < size; f += ${TEAM}u) {
    var sum = 0.0;
    for (var part = 0u; part < parts_; part++) {
      let row = i * parts_ + part;
      sum += sums[row * size + f] * exp_(tops[2u * row] - top);
    }
    y[start + f] = select(sum / total, 0.0, total == 0.0);
  }
  if (thread == 0u && p(5u) == 1u) {
    let heads = p(3u);
    let times = p(4u);
    let t = i / heads % times;
    lse[(i / heads / times * heads + i % heads) * times + t] = select(top + log_(total), -inf(), total == 0.0);
  }`,
  ),
}

interface Few {
  readonly op: string
  readonly q: Value
  readonly groups: number
  readonly keys: number
  readonly valueWidth: number
  readonly scale: number
  readonly program: Program
  /** Inputs other than q, and words from 9 on. */
  readonly buffers: readonly Buffer[]
  readonly words: readonly number[]
  readonly y: Buffer
  readonly lse?: Buffer
}

function ofFew(gpu: DeviceOps, { op, q, groups, keys, valueWidth, scale, program, buffers, words, y, lse }: Few): void {
  const [batch, times, heads, width] = q.shape
  const teams = batch * groups * Math.ceil((times * heads) / groups / 4)
  const parts = Math.max(1, Math.min(Math.floor((2 * FEW_TEAMS) / teams), Math.floor(keys / LEAST_KEYS)))
  const rows = batch * times * heads
  const all = [teams * parts, heads, times, keys, groups, width, valueWidth, word(scale), parts, ...words]
  if (parts === 1) {
    // If the second output is not needed, nothing is written to it, but its binding needs a buffer.
    const second = lse ?? gpu.between(op, 1)
    gpu.launch(program, [bufferOf(q), ...buffers, y, second], all, [teams])
    if (lse === undefined) gpu.done(second)
    return
  }
  const sums = gpu.between(op, rows * parts * valueWidth)
  const tops = gpu.between(op, 2 * rows * parts)
  const second = lse ?? gpu.between(op, 1)
  gpu.launch(program, [bufferOf(q), ...buffers, sums, tops], all, [teams * parts])
  gpu.launch(
    joined,
    [sums, tops, y, second],
    [rows, valueWidth, parts, heads, times, Number(lse !== undefined)],
    [rows],
  )
  gpu.done(sums, tops)
  if (lse === undefined) gpu.done(second)
}

// Word 9: causal, 10: whether there are lengths, 11: starts.
const ofHeads = (wide: boolean) =>
  overRows({
    label: 'attention',
    buffers: [quads('k', wide), quads('v', wide), 'lengths i32', 'starts i32'],
    keys: 'k',
    values: 'v',
    dtype: 'f32',
    key: '((b * p(3u) + j) * p(4u) + g) * width',
    value: '((b * p(3u) + j) * p(4u) + g) * value_width',
    wide,
    sees: `
      end = i32(p(3u));
      if (p(10u) == 1u) { end = min(end, lengths[b]); }
      if (p(9u) == 1u) {
        var limit = i32(p(3u));
        if (p(10u) == 1u) { limit = lengths[b]; }
        end = min(end, limit - i32(times) + i32(t) + 1);
      }
      if (p(11u) == 1u) { first = max(0, starts[b * times + t]); }`,
    lse: true,
  })

export const attention =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['attention']> =>
  (inputs, attrs, specs): Handle[] | undefined => {
    const [q, k, v, lengths, starts] = inputs
    const [, times, , width] = q.shape
    const [, keys, groups, valueWidth] = v.shape
    if (times > FEW_QUERIES) return attentionByTiles(gpu)(inputs, attrs, specs)
    if (width > MOST_KEY || valueWidth > MOST_VALUE || specs.some(spec => countOf(spec) === 0)) return undefined
    const [y, lse] = specs.map(spec => gpu.output('attention', spec))
    // A missing input is not read, but its binding needs a buffer.
    const buffers = [k, v, lengths ?? q, starts ?? q].map(bufferOf)
    const words = [attrs.causal, lengths !== undefined, starts !== undefined].map(Number)
    const program = ofHeads(areWide(width, valueWidth))
    ofFew(gpu, { op: 'attention', q, groups, keys, valueWidth, scale: attrs.scale, program, buffers, words, y, lse })
    return [y, lse]
  }

// Word 9: rows per page, 10: pages per sequence.
const latentRow = `(u32(pages[b * p(10u) + j / p(9u)]) * p(9u) + j % p(9u)) * width`
const sequenceRow = '(b * p(9u) + j) * width'

const ofLatents = (paged: boolean, dtype: 'f32' | 'bf16', wide: boolean) =>
  overRows({
    label: paged ? 'latentAttention in pages' : 'latentAttention',
    buffers: [quads('cache', wide, dtype), 'lengths i32', ...(paged ? ['pages i32'] : [])],
    keys: 'cache',
    values: 'cache',
    dtype,
    key: paged ? latentRow : sequenceRow,
    value: paged ? latentRow : sequenceRow,
    wide,
    sees: 'end = min(min(i32(p(3u)), lengths[b]), lengths[b] - i32(times) + i32(t) + 1);',
    lse: false,
  })

export const latentAttention =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['latentAttention']> =>
  ([q, cache, lengths, pages], { scale, valueDim }, [spec]) => {
    const [, times, , width] = q.shape
    const [, size] = cache.shape
    const few = times <= FEW_QUERIES && width <= MOST_KEY && valueDim <= MOST_VALUE
    if (!few || countOf(spec) === 0 || countOf(cache) === 0) return undefined
    const op = 'latentAttention'
    const y = gpu.output(op, spec)
    const perSequence = pages?.shape[1] ?? 1
    const buffers = [cache, lengths, ...(pages ? [pages] : [])].map(bufferOf)
    const program = ofLatents(pages !== undefined, cache.dtype === 'bf16' ? 'bf16' : 'f32', areWide(width))
    const shapes = { groups: 1, keys: size * perSequence, valueWidth: valueDim, words: [size, perSequence] }
    ofFew(gpu, { op, q, ...shapes, scale, program, buffers, y })
    return [y]
  }
