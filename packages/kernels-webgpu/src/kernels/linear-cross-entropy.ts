/**
 * @file Cross-entropy of logits that are never stored. A tile of logits is reduced to the largest of each row and the sum of exponentials, 1/32 of its size. The gradient
 * recomputes the logits, some columns at a time. N rows, V classes, D features.
 */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, type DeviceOps } from '../device-ops.ts'
import { exponential, logarithm, special } from './math.ts'
import { multiply } from './matmul.ts'
import { areWide, repeat } from './quads.ts'
import { eachRow, largest, TEAM } from './teams.ts'
import { eachValue, rowOf, TILE, tiled, tilesOf } from './tiles.ts'
import { plain } from './weights.ts'

/** Number of gradients of logits stored at once. Tests make it small. */
export const limits = { elements: 2 ** 22 }

const four = (text: (i: number) => string, first: number) =>
  `vec4<f32>(${[0, 1, 2, 3].map(i => text(first + i)).join(', ')})`

// Words: 0 N, 1 V, 2 D.
const tops = (wide: boolean): Program =>
  tiled({
    label: 'linearCrossEntropy tops',
    buffers: ['targets i32', 'tops* vec2<f32>', 'picked* f32'],
    wide,
    functions: `${special}${exponential}
fn most(x: vec4<f32>) -> f32 { return max(max(x.x, x.y), max(x.z, x.w)); }
fn total(x: vec4<f32>) -> f32 { return (exp_(x.x) + exp_(x.y)) + (exp_(x.z) + exp_(x.w)); }`,
    begin: `
  let rows = p(0u);
  let columns = p(1u);
  let k_first = 0u;
  let k_end = p(2u);
  let row0 = group.y * ${TILE}u;
  let column0 = group.x * ${TILE}u;`,
    left: { name: 'x', alongK: true, row: at => `${at} * k_end` },
    right: { name: 'w', alongK: true, row: at => `${at} * k_end` },
    finish: `
  let inside = vec4<u32>(column) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(columns);${repeat(
    8,
    i => `
  sum${i} = select(vec4<f32>(-3.0e38), sum${i}, inside);
  if (${rowOf(i)} < rows) {
    let target_ = targets[${rowOf(i)}];
    if (target_ >= i32(column) && target_ < i32(min(column + 4u, columns))) { picked[${rowOf(i)}] = sum${i}[u32(target_) - column]; }
  }`,
  )}
  workgroupBarrier();
  lefts[along * 8u + down] = ${four(i => `most(sum${i})`, 0)};
  lefts[128u + along * 8u + down] = ${four(i => `most(sum${i})`, 4)};
  workgroupBarrier();
  var upper = lefts[down];
  var lower = lefts[128u + down];
  for (var n = 1u; n < 16u; n++) {
    upper = max(upper, lefts[n * 8u + down]);
    lower = max(lower, lefts[128u + n * 8u + down]);
  }
  rights[along * 8u + down] = ${four(i => `total(sum${i} - upper[${i}])`, 0)};
  rights[128u + along * 8u + down] = ${four(i => `total(sum${i} - lower[${i - 4}])`, 4)};
  workgroupBarrier();
  if (along == 0u) {
    var upper_sum = vec4<f32>();
    var lower_sum = vec4<f32>();
    for (var n = 0u; n < 16u; n++) {
      upper_sum += rights[n * 8u + down];
      lower_sum += rights[128u + n * 8u + down];
    }
    let tiles = (columns + ${TILE - 1}u) / ${TILE}u;${repeat(
      8,
      i => `
    if (${rowOf(i)} < rows) {
      tops[${rowOf(i)} * tiles + group.x] = vec2<f32>(${i < 4 ? 'upper' : 'lower'}[${i % 4}], ${i < 4 ? 'upper' : 'lower'}_sum[${i % 4}]);
    }`,
    )}
  }`,
  })

// Word 2: the ignored class, 3: V.
const losses: Program = {
  label: 'linearCrossEntropy',
  buffers: ['tops vec2<f32>', 'picked f32', 'targets i32', 'loss* f32', 'lse* f32'],
  body: eachRow(
    special + exponential + logarithm + largest,
    `
  var own = -3.0e38;
  for (var k = thread; k < size; k += ${TEAM}u) { own = max_(own, tops[start + k].x); }
  let top = team_max(own, thread);
  var sum = 0.0;
  for (var k = thread; k < size; k += ${TEAM}u) { sum += tops[start + k].y * exp_(tops[start + k].x - top); }
  let total = team_sum(sum, thread);
  if (thread == 0u) {
    let own_lse = top + log_(total);
    let target_ = targets[i];
    lse[i] = own_lse;
    loss[i] = 0.0;
    if (target_ >= 0 && u32(target_) < p(3u) && target_ != bitcast<i32>(p(2u))) { loss[i] = own_lse - picked[i]; }
  }`,
  ),
}

export const linearCrossEntropy =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['linearCrossEntropy']> =>
  ([x, weight, targets], { ignoreIndex }, [lossSpec, lseSpec]) => {
    const op = 'linearCrossEntropy'
    const [rows, features] = x.shape
    const [classes] = weight.shape
    if (rows === 0 || classes === 0) return undefined
    const [loss, lse] = [gpu.output(op, lossSpec), gpu.output(op, lseSpec)]
    const tiles = tilesOf(classes)
    const [each, picked] = [gpu.between(op, 2 * rows * tiles), gpu.between(op, rows)]
    const given = [x, weight, targets].map(bufferOf)
    gpu.launch(tops(areWide(features)), [...given, each, picked], [rows, classes, features], [tiles, tilesOf(rows)])
    const words = [rows, tiles, ignoreIndex, classes]
    gpu.launch(losses, [each, picked, bufferOf(targets), loss, lse], words, [rows])
    gpu.done(each, picked)
    return [loss, lse]
  }

// Words: 0 N, 1 classes of this part, 2 D, 3 first class, 4 V, 5 pitch of the result, 6 the ignored class. Elements after the last class are 0.
const gradient = (wide: boolean): Program =>
  tiled({
    label: 'linearCrossEntropyBackward',
    buffers: ['targets i32', 'lse f32', 'dloss f32', 'dlogits* f32'],
    wide,
    functions: `${special}${exponential}`,
    begin: `
  let rows = p(0u);
  let columns = p(1u);
  let k_first = 0u;
  let k_end = p(2u);
  let row0 = group.y * ${TILE}u;
  let column0 = group.x * ${TILE}u;`,
    left: { name: 'x', alongK: true, row: at => `${at} * k_end` },
    right: { name: 'w', alongK: true, row: at => `(p(3u) + ${at}) * k_end` },
    finish: eachValue(
      `
        let target_ = targets[row];
        var d = 0.0;
        if (at < columns && target_ >= 0 && u32(target_) < p(4u) && target_ != bitcast<i32>(p(6u))) {
          d = (exp_(value - lse[row]) - f32(u32(target_) == p(3u) + at)) * dloss[row];
        }
        dlogits[row * p(5u) + at] = d;`,
      'p(5u)',
    ),
  })

export const linearCrossEntropyBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['linearCrossEntropyBackward']> =>
  ([x, weight, targets, lse, dloss], { ignoreIndex }, [spec, weightSpec]) => {
    const op = 'linearCrossEntropyBackward'
    const [rows, features] = x.shape
    const [classes] = weight.shape
    if (rows === 0 || classes === 0 || features === 0) return undefined
    const [dx, dweight] = [gpu.output(op, spec), gpu.output(op, weightSpec)]
    const most = Math.max(TILE, Math.floor(limits.elements / rows / TILE) * TILE)
    // A multiple of four, so that products can read it in vectors.
    const pitch = Math.min(most, Math.ceil(classes / 4) * 4)
    const dlogits = gpu.between(op, rows * pitch)
    const [bx, bw, ...rest] = [x, weight, targets, lse, dloss].map(bufferOf)
    for (let first = 0; first < classes; first += pitch) {
      const some = Math.min(pitch, classes - first)
      const words = [rows, some, features, first, classes, pitch, ignoreIndex]
      gpu.launch(gradient(areWide(features)), [bx, bw, ...rest, dlogits], words, [tilesOf(some), tilesOf(rows)])
      const a = { buffer: dlogits, pitch }
      const part = { pitch: features, start: first * features }
      multiply(gpu, op, {
        ...{ a, b: plain({ buffer: bw, ...part }), c: { buffer: dx, pitch: features }, adds: first > 0 },
        ...{ transposeA: false, transposeB: false, m: rows, n: features, k: some },
      })
      multiply(gpu, op, {
        ...{ a, b: plain({ buffer: bx, pitch: features }), c: { buffer: dweight, ...part } },
        ...{ transposeA: true, transposeB: false, m: some, n: features, k: rows },
      })
    }
    gpu.done(dlogits)
    return [dx, dweight]
  }
