/**
 * @file Attention with many queries, and its gradient, by tiles with an online softmax (Dao 2023, FlashAttention-2): scores are never stored.
 *
 * A workgroup owns 32 rows, whose sums it holds, and loops over tiles of 64 other rows: queries own and loop over keys (output, dq), or keys own and loop over queries (dk and
 * dv). No two workgroups write the same row, so the order of sums is fixed. The scores of a tile are a product over features, in steps of 16. The tile's probabilities times the
 * other rows are a product over the other rows, in steps of 8 or 4. A thread has 4 owned rows (`down`) and 4 others, or 4 features of each 64 (`along`). Vectors of four
 * run along owned rows in scores, and along features in sums.
 *
 * B batch, T queries, S keys, H heads, G key/value heads.
 */
import type { AttentionAttrs, FusedAttrs, FusedKernel, TensorSpec, Value } from '@moe/core'
import { type Program, word } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps } from '../device-ops.ts'
import { exponential, logarithm, special } from './math.ts'
import { areWide, quads, readQuad, repeat } from './quads.ts'
import { eachRow, TEAM } from './teams.ts'

const OWN = 32
const OTHERS = 64
/** Maximum number of features of any operand, limited by the registers for sums. */
const MOST_FEATURES = 256
/** Up to this many quads of features of keys and values together, a thread holds the sums of both. */
const MOST_QUADS = 6
/** Vectors of the other rows, or of both operands of scores, in workgroup memory: 8 of its 16 KiB hold probabilities. */
const OPERANDS = 384

/** Quads of features that a thread holds per row. */
const quadsOf = (features: number) => Math.ceil(features / 64)

// --- WGSL fragments ---

/** `first_of` and `end_of`, the keys that query t sees, from words `at`: T, S, causal, whether there are lengths, starts. None are seen where first >= end. */
const sees = (at: number) => `
fn first_of(b: u32, t: u32) -> i32 {
  if (p(${at + 4}u) == 1u) { return max(0, starts[b * p(${at}u) + t]); }
  return 0;
}
fn end_of(b: u32, t: u32) -> i32 {
  var limit = i32(p(${at + 1}u));
  if (p(${at + 3}u) == 1u) { limit = lengths[b]; }
  var end = min(limit, i32(p(${at + 1}u)));
  if (p(${at + 2}u) == 1u) { end = min(end, limit - i32(p(${at}u)) + i32(t) + 1); }
  return end;
}`

const common = `
var<workgroup> chances: array<vec4<f32>, ${(OTHERS * OWN) / 4}>;
var<workgroup> operands: array<vec4<f32>, ${OPERANDS}>;
var<workgroup> ranges: array<vec2<i32>, 16>;
var<workgroup> range: vec2<i32>;
fn exp4(x: vec4<f32>) -> vec4<f32> { return vec4<f32>(exp_(x.x), exp_(x.y), exp_(x.z), exp_(x.w)); }
fn least(x: vec4<i32>) -> i32 { return min(min(x.x, x.y), min(x.z, x.w)); }
fn most(x: vec4<i32>) -> i32 { return max(max(x.x, x.y), max(x.z, x.w)); }`

/** The smallest first and the largest end of all threads, as `of` each `index`; the same in all threads. */
const jointRange = (first: string, end: string, index: string, size: number, writes: string) => `
  if (${writes}) { ranges[${index}] = vec2<i32>(least(${first}), most(${end})); }
  workgroupBarrier();
  if (thread == 0u) {
    var all = ranges[0];
    for (var n = 1u; n < ${size}u; n++) { all = vec2<i32>(min(all.x, ranges[n].x), max(all.y, ranges[n].y)); }
    range = all;
  }
  let whole = workgroupUniformLoad(&range);`

/** Rows of one head: row i is at `base` + i * `row`, up to row `end`. All are WGSL expressions. */
interface Matrix {
  readonly name: string
  readonly rows: string
  readonly heads: string
  readonly width: string
}

const queryRows = (name: string, width = 'width'): Matrix => ({ name, rows: 'times', heads: 'heads', width })
const keyRows = (name: string, width = 'width'): Matrix => ({ name, rows: 'keys', heads: 'key_heads', width })

/** Offset of `head` of sequence b. */
const begin = ({ name, rows, heads, width }: Matrix, head: string) => `
  let ${name}_base = (b * ${rows} * ${heads} + ${head}) * ${width};`

/** Four features of a row; zeros after the last row. */
const quad = ({ name, rows, heads, width }: Matrix, row: string, feature: string) =>
  `${name}4(${name}_base + (${row}) * ${heads} * ${width}, ${feature}, select(0u, ${width}, ${row} < ${rows}))`

/** Dot products of rows, `<name>0` to `<name>3`: the 4 owned rows with each of 4 others. */
const scores = (name: string, own: Matrix, others: Matrix) => {
  const block = (matrix: Matrix, first: string) =>
    `transpose(mat4x4<f32>(${[0, 1, 2, 3].map(c => quad(matrix, `${first} + rows + ${c}u`, 'f')).join(', ')}))`
  return `${repeat(
    4,
    j => `
  var ${name}${j} = vec4<f32>();`,
  )}
  for (var f0 = 0u; f0 < ${own.width}; f0 += 16u) {
    workgroupBarrier();
    if (thread < 32u) {
      let rows = thread % 8u * 4u;
      let f = f0 + thread / 8u * 4u;
      var block = ${block(own, 'own0')};
      for (var c = 0u; c < 4u; c++) { operands[(thread / 8u * 4u + c) * 8u + thread % 8u] = block[c]; }
    } else if (thread >= 64u) {
      let rows = thread % 16u * 4u;
      let f = f0 + (thread - 64u) / 16u * 4u;
      var block = ${block(others, 'other0')};
      for (var c = 0u; c < 4u; c++) { operands[128u + ((thread - 64u) / 16u * 4u + c) * 16u + thread % 16u] = block[c]; }
    }
    workgroupBarrier();
    for (var f = 0u; f < 16u; f++) {
      let own = operands[f * 8u + down];
      let others = operands[128u + f * 16u + along];${repeat(
        4,
        j => `
      ${name}${j} += own * others[${j}];`,
      )}
    }
  }`
}

/** Stores the factors for `weighted`. All threads have passed a barrier since they were last read. */
const store = (name: string) =>
  repeat(
    4,
    j => `
  chances[(${j}u * 8u + down) * 16u + along] = ${name}${j};`,
  )

/** Sums `<name>_<owned row>_<quad of features>`. */
const sums = (name: string, count: number) =>
  repeat(4, i =>
    repeat(
      count,
      m => `
  var ${name}_${i}_${m} = vec4<f32>();`,
    ),
  )

/** Adds the other rows, multiplied by the stored factors. */
const weighted = (name: string, count: number, others: Matrix) => {
  const rows = 128 * count > OPERANDS ? 4 : 8
  const team = TEAM / rows
  return `
  for (var c0 = 0u; c0 < ${OTHERS}u; c0 += ${rows}u) {
    workgroupBarrier();${repeat(
      (16 * count) / team,
      n => `
    operands[thread / ${team}u * ${16 * count}u + ${team * n}u + thread % ${team}u] = ${quad(others, `other0 + c0 + thread / ${team}u`, `(${team * n}u + thread % ${team}u) * 4u`)};`,
    )}
    workgroupBarrier();
    for (var r = 0u; r < ${rows}u; r++) {
      let chance = chances[((r & 3u) * 8u + down) * 16u + (c0 + r) / 4u];${repeat(
        count,
        m => `
      let row_${m} = operands[r * ${16 * count}u + ${16 * m}u + along];${repeat(
        4,
        i => `
      ${name}_${i}_${m} += chance[${i}] * row_${m};`,
      )}`,
      )}
    }
  }`
}

/** Writes the sums to rows of the output `matrix`; `value` is the expression for quad (i, m). */
const write = (matrix: Matrix, count: number, value: (i: number, m: number) => string) => {
  const { name, rows, heads, width } = matrix
  return repeat(
    4,
    i => `
  if (own0 + 4u * down + ${i}u < ${rows}) {
    let at = ${name}_base + (own0 + 4u * down + ${i}u) * ${heads} * ${width};${repeat(
      count,
      m => `
    {
      let value = ${value(i, m)};
      for (var c = 0u; c < 4u; c++) {
        let f = ${64 * m}u + along * 4u + c;
        if (f < ${width}) { ${name}[at + f] = value[c]; }
      }
    }`,
    )}
  }`,
  )
}

/** Words: 0 workgroups, 1 blocks of owned rows, 2 H, 3 G, 4 features of a key, 5 of a value, 6 scale, then T, S and what queries see. */
const main = (body: string) => `
@compute @workgroup_size(${TEAM})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let i = group.y * groups.x + group.x;
  if (i >= p(0u)) { return; }
  let blocks = p(1u);
  let heads = p(2u);
  let key_heads = p(3u);
  let width = p(4u);
  let value_width = p(5u);
  let scale = bitcast<f32>(p(6u));
  let times = p(7u);
  let keys = p(8u);
  let down = thread / 16u;
  let along = thread % 16u;${body}
}`

/** For owned queries: the last ones, which see most keys, start first. */
const ofQueries = `
  let own0 = (blocks - 1u - i % blocks) * ${OWN}u;
  let head = i / blocks % heads;
  let key_head = head / (heads / key_heads);
  let b = i / blocks / heads;
  var first = vec4<i32>(2147483647);
  var end = vec4<i32>();`

/** A loop over the tiles of keys that any of the queries sees; `seen<j>` tells which of the 4 see key j. */
const overKeys = (body: string) => `
${jointRange('first', 'end', 'down', 8, 'along == 0u')}
  for (var j0 = whole.x; j0 < whole.y; j0 += ${OTHERS}) {
    let other0 = u32(j0);${repeat(
      4,
      j => `
    let key${j} = vec4<i32>(j0 + i32(4u * along) + ${j});
    let seen${j} = (first <= key${j}) & (key${j} < end);`,
    )}
${body}
  }`

// --- forward ---

const [q, k, v] = [queryRows('q'), keyRows('k'), keyRows('v', 'value_width')]
const y = queryRows('y', 'value_width')
const dout = queryRows('dout', 'value_width')

/** Scores start with a number below any score. A masked score is recognized by its probability, which is 0. */
const forward = (count: number, wide: boolean): Program => ({
  label: `attention by tiles ${count} ${wide}`,
  buffers: [quads('q', wide), quads('k', wide), quads('v', wide), 'lengths i32', 'starts i32', 'y* f32', 'lse* f32'],
  body: `${special}${exponential}${logarithm}${sees(7)}${common}${['q', 'k', 'v'].map(name => readQuad(name, wide)).join('')}
${main(`${ofQueries}
  for (var c = 0u; c < 4u; c++) {
    let t = own0 + 4u * down + c;
    if (t < times) {
      let seen = vec2<i32>(first_of(b, t), end_of(b, t));
      if (seen.x < seen.y) { first[c] = seen.x; end[c] = seen.y; }
    }
  }
${begin(q, 'head')}${begin(k, 'key_head')}${begin(v, 'key_head')}${begin(y, 'head')}
  var top = vec4<f32>(-3.0e38);
  var own_total = vec4<f32>();${sums('sum', count)}
${overKeys(`${scores('s', q, k)}${repeat(
  4,
  j => `
    s${j} = select(vec4<f32>(-3.0e38), s${j} * scale, seen${j});`,
)}
    workgroupBarrier();
    operands[along * 8u + down] = max(max(s0, s1), max(s2, s3));
    workgroupBarrier();
    var new_top = top;
    for (var n = 0u; n < 16u; n++) { new_top = max(new_top, operands[n * 8u + down]); }
    let shrink = exp4(top - new_top);
    top = new_top;${repeat(
      4,
      j => `
    s${j} = select(vec4<f32>(), exp4(s${j} - top), seen${j});`,
    )}
    own_total = own_total * shrink + ((s0 + s1) + (s2 + s3));${repeat(4, i =>
      repeat(
        count,
        m => `
    sum_${i}_${m} *= shrink[${i}];`,
      ),
    )}${store('s')}${weighted('sum', count, v)}`)}
  workgroupBarrier();
  operands[along * 8u + down] = own_total;
  workgroupBarrier();
  var total = vec4<f32>();
  for (var n = 0u; n < 16u; n++) { total += operands[n * 8u + down]; }
${write(y, count, (i, m) => `select(sum_${i}_${m} / total[${i}], vec4<f32>(), total[${i}] == 0.0)`)}
  if (along == 0u) {
    for (var c = 0u; c < 4u; c++) {
      let t = own0 + 4u * down + c;
      if (t < times) { lse[(b * heads + head) * times + t] = select(top[c] + log_(total[c]), -inf(), total[c] == 0.0); }
    }
  }`)}`,
})

const flagsOf = ({ causal }: AttentionAttrs, lengths?: Value, starts?: Value) =>
  [causal, lengths !== undefined, starts !== undefined].map(Number)

const blocksOf = (rows: number) => Math.ceil(rows / OWN)

/** Whether the tiles support these sizes. */
function fits({ shape: [batch, times, heads, width] }: Value, { shape: [, keys, , valueWidth] }: Value): boolean {
  const sizes = [batch, times, heads, width, keys, valueWidth]
  return sizes.every(size => size > 0) && Math.max(width, valueWidth) <= MOST_FEATURES
}

/** Parameters, for `rows` owned rows in each of `heads`. */
function wordsOf(rows: number, heads: number, q: Value, v: Value, { scale }: AttentionAttrs): number[] {
  const [batch, times, queryHeads, width] = q.shape
  const [, keys, keyHeads, valueWidth] = v.shape
  const workgroups = batch * heads * blocksOf(rows)
  return [workgroups, blocksOf(rows), queryHeads, keyHeads, width, valueWidth, word(scale), times, keys]
}

export const attentionByTiles =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['attention']> =>
  ([q, k, v, lengths, starts], attrs, [spec, lseSpec]) => {
    if (!fits(q, v)) return undefined
    const [y, lse] = [gpu.output('attention', spec), gpu.output('attention', lseSpec)]
    const [, times, heads, width] = q.shape
    const valueWidth = v.shape[3]
    const words = wordsOf(times, heads, q, v, attrs)
    // A missing input is not read, but its binding needs a buffer.
    const buffers = [...[q, k, v, lengths ?? q, starts ?? q].map(bufferOf), y, lse]
    const program = forward(quadsOf(valueWidth), areWide(width, valueWidth))
    gpu.launch(program, buffers, [...words, ...flagsOf(attrs, lengths, starts)], [words[0]])
    return [y, lse]
  }

// --- backward ---

/** Saved per query and head: log-sum-exp, sum of out * dout (as bits), first key, end of keys. */
const summaries: Program = {
  label: 'attentionBackward summaries',
  buffers: ['y f32', 'lse f32', 'dout f32', 'lengths i32', 'starts i32', 'summaries* vec4<i32>'],
  body: eachRow(
    sees(3),
    `
  var own = 0.0;
  for (var f = thread; f < size; f += ${TEAM}u) { own += y[start + f] * dout[start + f]; }
  let delta = team_sum(own, thread);
  if (thread == 0u) {
    let heads = p(2u);
    let times = p(3u);
    let t = i / heads % times;
    let b = i / heads / times;
    let at = (b * heads + i % heads) * times + t;
    var seen = vec2<i32>(first_of(b, t), end_of(b, t));
    if (seen.x >= seen.y) { seen = vec2<i32>(2147483647, 0); }
    summaries[at] = vec4<i32>(bitcast<i32>(lse[at]), bitcast<i32>(delta), seen);
  }`,
  ),
}

/** WGSL: loads the saved values of the four queries from `query` on; `first` and `end` are already set. */
const knownOf = (query: string) => `
  var lse = vec4<f32>();
  var delta = vec4<f32>();
  for (var c = 0u; c < 4u; c++) {
    let t = ${query} + c;
    if (t < times) {
      let summary = summaries[(b * heads + head) * times + t];
      lse[c] = bitcast<f32>(summary.x);
      delta[c] = bitcast<f32>(summary.y);
      first[c] = summary.z;
      end[c] = summary.w;
    }
  }`

const ofQueryGradients = (count: number, wide: boolean): Program => ({
  label: `attentionBackward dq ${count} ${wide}`,
  buffers: [...['q', 'k', 'v', 'dout'].map(name => quads(name, wide)), 'summaries vec4<i32>', 'dq* f32'],
  body: `${special}${exponential}${common}${['q', 'k', 'v', 'dout'].map(name => readQuad(name, wide)).join('')}
${main(`${ofQueries}
${knownOf('own0 + 4u * down')}
${begin(q, 'head')}${begin(k, 'key_head')}${begin(v, 'key_head')}${begin(dout, 'head')}${begin(queryRows('dq'), 'head')}
${sums('dq', count)}
${overKeys(
  `${scores('s', q, k)}${scores('d', dout, v)}${repeat(
    4,
    j => `
    s${j} = select(vec4<f32>(), exp4(s${j} * scale - lse) * (d${j} - delta) * scale, seen${j});`,
  )}${store('s')}${weighted('dq', count, k)}`,
)}
${write(queryRows('dq'), count, (i, m) => `dq_${i}_${m}`)}`)}`,
})

/** Gradients of keys, of values, or of both, as selected by their numbers of quads. */
const ofKeyGradients = (keyCount: number, valueCount: number, wide: boolean): Program => {
  const [ofKeys, ofValues] = [keyCount > 0, valueCount > 0]
  const given = ofKeys ? ['q', 'k', 'v', 'dout'] : ['q', 'k', 'dout']
  const outputs = [...(ofKeys ? ['dk* f32'] : []), ...(ofValues ? ['dv* f32'] : [])]
  const [dk, dv] = [keyRows('dk'), keyRows('dv', 'value_width')]
  return {
    label: `attentionBackward dk dv ${keyCount} ${valueCount} ${wide}`,
    buffers: [...given.map(name => quads(name, wide)), 'summaries vec4<i32>', ...outputs],
    body: `${special}${exponential}${common}${given.map(name => readQuad(name, wide)).join('')}
${main(`
  let own0 = i % blocks * ${OWN}u;
  let key_head = i / blocks % key_heads;
  let b = i / blocks / key_heads;
  let key = vec4<i32>(i32(own0 + 4u * down)) + vec4<i32>(0, 1, 2, 3);
${begin(k, 'key_head')}${ofKeys ? begin(v, 'key_head') + begin(dk, 'key_head') : ''}${ofValues ? begin(dv, 'key_head') : ''}
${sums('dk', keyCount)}${sums('dv', valueCount)}
  let share = heads / key_heads;
  for (var head = key_head * share; head < (key_head + 1u) * share; head++) {
${begin(q, 'head')}${begin(dout, 'head')}
    for (var other0 = 0u; other0 < times; other0 += ${OTHERS}u) {
      var first = vec4<i32>(2147483647);
      var end = vec4<i32>();
${knownOf('other0 + 4u * along')}
${jointRange('first', 'end', 'along', 16, 'down == 0u')}
      if (whole.x >= i32(own0 + ${OWN}u) || whole.y <= i32(own0)) { continue; }
${scores('s', k, q)}${repeat(
  4,
  j => `
      s${j} = select(vec4<f32>(), exp4(s${j} * scale - vec4<f32>(lse[${j}])), (vec4<i32>(first[${j}]) <= key) & (key < vec4<i32>(end[${j}])));`,
)}${ofValues ? `${store('s')}${weighted('dv', valueCount, dout)}` : ''}${
  ofKeys
    ? `${scores('d', v, dout)}${repeat(
        4,
        j => `
      d${j} = s${j} * (d${j} - vec4<f32>(delta[${j}])) * scale;`,
      )}${store('d')}${weighted('dk', keyCount, q)}`
    : ''
}
    }
  }
${ofKeys ? write(dk, keyCount, (i, m) => `dk_${i}_${m}`) : ''}${ofValues ? write(dv, valueCount, (i, m) => `dv_${i}_${m}`) : ''}`)}`,
  }
}

export const attentionBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['attentionBackward']> =>
  ([q, k, v, out, lse, dout, lengths, starts], attrs, specs) => {
    if (!fits(q, v)) return undefined
    const op = 'attentionBackward'
    const [dq, dk, dv] = specs.map((spec: TensorSpec) => gpu.output(op, spec))
    const [, times, heads, width] = q.shape
    const [, keys, keyHeads, valueWidth] = v.shape
    const wide = areWide(width, valueWidth)
    const queries = countOf(lse)
    const known = gpu.between(op, 4 * queries)
    const seen = [times, keys, ...flagsOf(attrs, lengths, starts)]
    const given = [out, lse, dout, lengths ?? lse, starts ?? lse].map(bufferOf)
    gpu.launch(summaries, [...given, known], [queries, valueWidth, heads, ...seen], [queries])
    const read = [...[q, k, v, dout].map(bufferOf), known]
    const byQueries = wordsOf(times, heads, q, v, attrs)
    gpu.launch(ofQueryGradients(quadsOf(width), wide), [...read, dq], byQueries, [byQueries[0]])
    const byKeys = wordsOf(keys, keyHeads, q, v, attrs)
    const [forKeys, forValues] = [quadsOf(width), quadsOf(valueWidth)]
    if (forKeys + forValues <= MOST_QUADS) {
      gpu.launch(ofKeyGradients(forKeys, forValues, wide), [...read, dk, dv], byKeys, [byKeys[0]])
    } else {
      gpu.launch(ofKeyGradients(forKeys, 0, wide), [...read, dk], byKeys, [byKeys[0]])
      gpu.launch(ofKeyGradients(0, forValues, wide), [...[q, k, dout].map(bufferOf), known, dv], byKeys, [byKeys[0]])
    }
    gpu.done(known)
    return [dq, dk, dv]
  }
