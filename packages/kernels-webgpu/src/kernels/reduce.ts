/** @file Sums and maxima over axes, cumulative sums, and top-k. */
import type { Kernel, PrimitiveAttrs, ReduceCode } from '@moe/core'
import { mergeAxes, rowMajor } from '@moe/core/strides'
import type { Program } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement, elementOf, placeInNest } from '../device-ops.ts'
import { special } from './math.ts'
import { eachRow, TEAM } from './teams.ts'

const joins: { readonly [C in ReduceCode]: { readonly [element: string]: readonly [first: string, join: string] } } = {
  sum: { f32: ['0.0', 'a + b'], i32: ['0', 'a + b'] },
  max: { f32: ['-inf()', 'max_(a, b)'], i32: ['-2147483647 - 1', 'max(a, b)'] },
}

/** Maximum number of elements that a single thread adds. */
const FEW = 32
/** Parameters: count, rank and nest of the outputs, followed by the nest of the elements that are reduced. */
const nests = `
${placeInNest}
fn within(i: u32) -> u32 {
  let outer = 4u + 2u * p(1u);
  let rank = p(3u);
  var rest = i;
  var at = 0u;
  for (var axis = rank; axis > 0u; axis--) {
    let size = p(outer + axis - 1u);
    at += (rest % size) * p(outer + rank + axis - 1u);
    rest /= size;
  }
  return at;
}`

function alone(code: ReduceCode, element: string): Program {
  const [first, join] = joins[code][element]
  return {
    label: `${code} ${element} alone`,
    buffers: [`x ${element}`, `y* ${element}`],
    body: `${special}${nests}
fn joined(a: ${element}, b: ${element}) -> ${element} { return ${join}; }
${eachElement(`
  let at = place(i, 4u, 4u + p(1u));
  var all: ${element} = ${first};
  for (var k = 0u; k < p(2u); k++) { all = joined(all, x[at + within(k)]); }
  y[i] = all;`)}`,
  }
}

function inTeams(code: ReduceCode, element: string): Program {
  const [first, join] = joins[code][element]
  return {
    label: `${code} ${element} in teams`,
    buffers: [`x ${element}`, `y* ${element}`],
    body: `${special}${nests}
fn joined(a: ${element}, b: ${element}) -> ${element} { return ${join}; }
var<workgroup> parts: array<${element}, ${TEAM}>;
@compute @workgroup_size(${TEAM})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let i = group.y * groups.x + group.x;
  let inside = i < p(0u);
  let start = place(select(0u, i, inside), 4u, 4u + p(1u));
  var all: ${element} = ${first};
  for (var k = thread; k < p(2u); k += ${TEAM}u) { all = joined(all, x[start + within(k)]); }
  parts[thread] = all;
  for (var step = ${TEAM / 2}u; step > 0u; step >>= 1u) {
    workgroupBarrier();
    if (thread < step) { parts[thread] = joined(parts[thread], parts[thread + step]); }
  }
  if (thread == 0u && inside) { y[i] = parts[0]; }
}`,
  }
}

export const reduce =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['reduce']> =>
  ([x], { code, axes }, [spec]) => {
    const y = gpu.output(code, spec)
    const strides = rowMajor(x.shape)
    const nestOf = (chosen: readonly number[]) => {
      const { sizes, strides: merged } = mergeAxes(
        chosen.map(axis => x.shape[axis]),
        [chosen.map(axis => strides[axis])],
      )
      return { rank: sizes.length, words: [...sizes, ...merged[0]] }
    }
    const all = x.shape.map((_, axis) => axis)
    const outer = nestOf(all.filter(axis => !axes.includes(axis)))
    const inner = nestOf(axes)
    const count = countOf(spec)
    const size = axes.reduce((product, axis) => product * x.shape[axis], 1)
    const parameters = [count, outer.rank, size, inner.rank, ...outer.words, ...inner.words]
    const element = elementOf(spec.dtype)
    if (size <= FEW) gpu.each(alone(code, element), [bufferOf(x), y], count, parameters.slice(1))
    else gpu.launch(inTeams(code, element), [bufferOf(x), y], parameters, [count])
    return [y]
  }

const running = (element: string): Program => ({
  label: `cumsum ${element}`,
  buffers: [`x ${element}`, `y* ${element}`],
  body: eachElement(`
  let size = p(1u);
  let inner = p(2u);
  var at = i / inner * inner * size + i % inner;
  var sum = ${element}(0);
  for (var k = 0u; k < size; k++) {
    sum += x[at];
    y[at] = sum;
    at += inner;
  }`),
})

export const cumsum =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['cumsum']> =>
  ([x], { axis }, [spec]) => {
    const y = gpu.output('cumsum', spec)
    const size = spec.shape[axis]
    const inner = spec.shape.slice(axis + 1).reduce((product, n) => product * n, 1)
    if (countOf(spec) > 0) {
      gpu.each(running(elementOf(spec.dtype)), [bufferOf(x), y], countOf(spec) / size, [size, inner])
    }
    return [y]
  }

// Each choice is the best of those after the previous one: smaller, or equal with a higher index.
const largest: Program = {
  label: 'topk',
  buffers: ['x f32', 'values* f32', 'indices* i32'],
  body: `${special}
fn key(at: u32) -> f32 { let v = x[at]; return select(v, -inf(), is_nan(v)); }
${eachElement(`
  let size = p(1u);
  let k = p(2u);
  var last = inf();
  var before = -1;
  for (var n = 0u; n < k; n++) {
    var best = -inf();
    var chosen = -1;
    for (var j = 0u; j < size; j++) {
      let v = key(i * size + j);
      let left = v < last || (v == last && i32(j) > before);
      if (left && (chosen < 0 || v > best)) { best = v; chosen = i32(j); }
    }
    values[i * k + n] = x[i * size + u32(chosen)];
    indices[i * k + n] = chosen;
    last = best;
    before = chosen;
  }`)}`,
}

/** The same with a team of threads, each of which reads every 128th element. */
const largestInTeams: Program = {
  label: 'topk in teams',
  buffers: ['x f32', 'values* f32', 'indices* i32'],
  body: eachRow(
    `${special}
var<workgroup> found: array<i32, ${TEAM}>;
fn key(at: u32) -> f32 { let v = x[at]; return select(v, -inf(), is_nan(v)); }`,
    `
  let k = p(2u);
  var last = inf();
  var before = -1;
  for (var n = 0u; n < k; n++) {
    var best = -inf();
    var chosen = -1;
    for (var j = thread; j < size; j += ${TEAM}u) {
      let v = key(start + j);
      let left = v < last || (v == last && i32(j) > before);
      if (left && (chosen < 0 || v > best)) { best = v; chosen = i32(j); }
    }
    workgroupBarrier();
    parts[thread] = best;
    found[thread] = chosen;
    for (var step = ${TEAM / 2}u; step > 0u; step >>= 1u) {
      workgroupBarrier();
      if (thread < step) {
        let other = found[thread + step];
        let its = parts[thread + step];
        let own = found[thread];
        let better = its > parts[thread] || (its == parts[thread] && other < own);
        if (other >= 0 && (own < 0 || better)) { parts[thread] = its; found[thread] = other; }
      }
    }
    workgroupBarrier();
    last = parts[0];
    before = found[0];
    if (thread == 0u) {
      values[i * k + n] = x[start + u32(before)];
      indices[i * k + n] = before;
    }
  }`,
  ),
}

/** Maximum number of elements of a row that a single thread searches. */
const SHORT_ROW = 64

export const topk =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['topk']> =>
  ([x], { k }, [spec, numbers]) => {
    const buffers = [bufferOf(x), gpu.output('topk', spec), gpu.output('topk', numbers)]
    const size = x.shape[x.shape.length - 1]
    const rows = countOf(spec) / k
    if (size <= SHORT_ROW) gpu.each(largest, buffers, rows, [size, k])
    else gpu.launch(largestInTeams, buffers, [rows, size, k], [rows])
    return buffers.slice(1)
  }
