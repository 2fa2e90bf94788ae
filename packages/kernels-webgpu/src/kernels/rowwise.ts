/** @file Fused ops over rows, with a team of threads for each row. D features per row. */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import { type Program, word } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement } from '../device-ops.ts'
import { exponential, logarithm, special } from './math.ts'
import { eachRow, featuresOf, largest, rowsOf, TEAM } from './teams.ts'

const softmaxRows: Program = {
  label: 'softmax',
  buffers: ['x f32', 'y* f32'],
  body: eachRow(
    special + exponential + largest,
    `
  var own = -inf();
  for (var k = thread; k < size; k += ${TEAM}u) { own = max_(own, x[start + k]); }
  let top = team_max(own, thread);
  let base = select(top, 0.0, is_inf(top) && is_negative(top));
  var sum = 0.0;
  for (var k = thread; k < size; k += ${TEAM}u) { sum += exp_(x[start + k] - base); }
  let total = max_(team_sum(sum, thread), 1e-37);
  for (var k = thread; k < size; k += ${TEAM}u) { y[start + k] = exp_(x[start + k] - base) / total; }`,
  ),
}

export const softmax =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['softmax']> =>
  ([x], _, [spec]) => {
    const y = gpu.output('softmax', spec)
    const [rows, features] = rowsOf(spec)
    gpu.launch(softmaxRows, [bufferOf(x), y], [rows, features], [rows])
    return [y]
  }

const softmaxBackwardRows: Program = {
  label: 'softmaxBackward',
  buffers: ['y f32', 'dy f32', 'dx* f32'],
  body: eachRow(
    '',
    `
  var own = 0.0;
  for (var k = thread; k < size; k += ${TEAM}u) { own += y[start + k] * dy[start + k]; }
  let sum = team_sum(own, thread);
  for (var k = thread; k < size; k += ${TEAM}u) { dx[start + k] = y[start + k] * (dy[start + k] - sum); }`,
  ),
}

export const softmaxBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['softmaxBackward']> =>
  ([y, dy], _, [spec]) => {
    const dx = gpu.output('softmaxBackward', spec)
    const [rows, features] = rowsOf(spec)
    gpu.launch(softmaxBackwardRows, [bufferOf(y), bufferOf(dy), dx], [rows, features], [rows])
    return [dx]
  }

const rmsNormRows: Program = {
  label: 'rmsNorm',
  buffers: ['x f32', 'weight f32', 'y* f32', 'rstd* f32'],
  body: eachRow(
    '',
    `
  var own = 0.0;
  for (var k = thread; k < size; k += ${TEAM}u) { own += x[start + k] * x[start + k]; }
  let scale = 1.0 / sqrt(team_sum(own, thread) / f32(size) + bitcast<f32>(p(2u)));
  for (var k = thread; k < size; k += ${TEAM}u) { y[start + k] = x[start + k] * scale * weight[k]; }
  if (thread == 0u) { rstd[i] = scale; }`,
  ),
}

export const rmsNorm =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['rmsNorm']> =>
  ([x, weight], { eps }, [spec, rstdSpec]) => {
    const [rows, features] = rowsOf(spec)
    if (rows === 0) return undefined
    const [y, rstd] = [gpu.output('rmsNorm', spec), gpu.output('rmsNorm', rstdSpec)]
    gpu.launch(rmsNormRows, [bufferOf(x), bufferOf(weight), y, rstd], [rows, features, word(eps)], [rows])
    return [y, rstd]
  }

const rmsNormInputs: Program = {
  label: 'rmsNormBackward dx',
  buffers: ['x f32', 'weight f32', 'rstd f32', 'dy f32', 'dx* f32'],
  body: eachRow(
    '',
    `
  let scale = rstd[i];
  var own = 0.0;
  for (var k = thread; k < size; k += ${TEAM}u) { own += x[start + k] * weight[k] * dy[start + k]; }
  let mean = team_sum(own, thread) / f32(size) * scale * scale;
  for (var k = thread; k < size; k += ${TEAM}u) { dx[start + k] = scale * (dy[start + k] * weight[k] - x[start + k] * mean); }`,
  ),
}

/** Rows that one thread of a column adds; `reduce` then adds the partial sums. */
const rmsNormWeight: Program = {
  label: 'rmsNormBackward dweight',
  buffers: ['x f32', 'rstd f32', 'dy f32', 'parts* f32'],
  body: eachElement(`
  let size = p(1u);
  let column = i % size;
  var sum = 0.0;
  for (var row = i / size; row < p(2u); row += p(3u)) { sum += x[row * size + column] * rstd[row] * dy[row * size + column]; }
  parts[i] = sum;`),
}

const columnSums: Program = {
  label: 'sums of columns',
  buffers: ['parts f32', 'y* f32'],
  body: eachElement(`
  var sum = 0.0;
  for (var k = 0u; k < p(1u); k++) { sum += parts[k * p(0u) + i]; }
  y[i] = sum;`),
}

export const rmsNormBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['rmsNormBackward']> =>
  ([x, weight, rstd, dy], _, [spec, weightSpec]) => {
    const [rows, features] = rowsOf(spec)
    if (rows === 0) return undefined
    const [dx, dw] = [gpu.output('rmsNormBackward', spec), gpu.output('rmsNormBackward', weightSpec)]
    const [bx, bw, br, bdy] = [x, weight, rstd, dy].map(bufferOf)
    gpu.launch(rmsNormInputs, [bx, bw, br, bdy, dx], [rows, features], [rows])
    const shares = Math.min(rows, 32)
    const parts = gpu.between('rmsNormBackward', shares * features)
    gpu.each(rmsNormWeight, [bx, br, bdy, parts], shares * features, [features, rows, shares])
    gpu.each(columnSums, [parts, dw], features, [shares])
    gpu.done(parts)
    return [dx, dw]
  }

const crossEntropyRows: Program = {
  label: 'crossEntropy',
  buffers: ['x f32', 'targets i32', 'loss* f32', 'lse* f32'],
  body: eachRow(
    special + exponential + logarithm + largest,
    `
  var own = -inf();
  for (var k = thread; k < size; k += ${TEAM}u) { own = max_(own, x[start + k]); }
  let top = team_max(own, thread);
  let base = select(top, 0.0, is_inf(top) && is_negative(top));
  var sum = 0.0;
  for (var k = thread; k < size; k += ${TEAM}u) { sum += exp_(x[start + k] - base); }
  let total = team_sum(sum, thread);
  if (thread == 0u) {
    let own_lse = base + log_(total);
    let target_ = targets[i];
    lse[i] = own_lse;
    loss[i] = 0.0;
    if (target_ >= 0 && u32(target_) < size && target_ != bitcast<i32>(p(2u))) { loss[i] = own_lse - x[start + u32(target_)]; }
  }`,
  ),
}

export const crossEntropy =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['crossEntropy']> =>
  ([logits, targets], { ignoreIndex }, [lossSpec, lseSpec]) => {
    const [rows, features] = rowsOf(logits)
    if (rows === 0) return undefined
    const [loss, lse] = [gpu.output('crossEntropy', lossSpec), gpu.output('crossEntropy', lseSpec)]
    const buffers = [bufferOf(logits), bufferOf(targets), loss, lse]
    gpu.launch(crossEntropyRows, buffers, [rows, features, ignoreIndex], [rows])
    return [loss, lse]
  }

const crossEntropyGradient: Program = {
  label: 'crossEntropyBackward',
  buffers: ['x f32', 'targets i32', 'lse f32', 'dloss f32', 'dx* f32'],
  body: `${special}${exponential}${eachElement(`
  let size = p(1u);
  let row = i / size;
  let target_ = targets[row];
  var y = 0.0;
  if (target_ >= 0 && u32(target_) < size && target_ != bitcast<i32>(p(2u))) {
    y = (exp_(x[i] - lse[row]) - f32(u32(target_) == i % size)) * dloss[row];
  }
  dx[i] = y;`)}`,
}

export const crossEntropyBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['crossEntropyBackward']> =>
  ([logits, targets, lse, dloss], { ignoreIndex }, [spec]) => {
    const dx = gpu.output('crossEntropyBackward', spec)
    const buffers = [logits, targets, lse, dloss].map(bufferOf)
    gpu.each(crossEntropyGradient, [...buffers, dx], countOf(spec), [featuresOf(spec), ignoreIndex])
    return [dx]
  }

const gated: Program = {
  label: 'swiglu',
  buffers: ['gate f32', 'up f32', 'y* f32'],
  body: `${special}${exponential}${eachElement('y[i] = gate[i] * sigmoid_(gate[i]) * up[i];')}`,
}

export const swiglu =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['swiglu']> =>
  ([gate, up], _, [spec]) => {
    const y = gpu.output('swiglu', spec)
    gpu.each(gated, [bufferOf(gate), bufferOf(up), y], countOf(spec))
    return [y]
  }

const gatedBackward: Program = {
  label: 'swigluBackward',
  buffers: ['gate f32', 'up f32', 'dy f32', 'dgate* f32', 'dup* f32'],
  body: `${special}${exponential}${eachElement(`
  let g = gate[i];
  let s = sigmoid_(g);
  let d = dy[i];
  dgate[i] = d * up[i] * s * (1.0 + g * (1.0 - s));
  dup[i] = d * g * s;`)}`,
}

export const swigluBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['swigluBackward']> =>
  ([gate, up, dy], _, [spec, upSpec]) => {
    const [dgate, dup] = [gpu.output('swigluBackward', spec), gpu.output('swigluBackward', upSpec)]
    gpu.each(gatedBackward, [...[gate, up, dy].map(bufferOf), dgate, dup], countOf(spec))
    return [dgate, dup]
  }
