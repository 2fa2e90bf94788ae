/** @file Rows by index: takes, adds and replaces them. */
import type { DType, Kernel, PrimitiveAttrs, Shape, Value } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement, elementOf } from '../device-ops.ts'
import type { Buffer } from '../memory.ts'
import { compute, put, putsInto, readBits } from './packed.ts'

const width = (shape: Shape, rowAxes: number) => shape.slice(rowAxes).reduce((product, size) => product * size, 1)

export const takeRows =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['takeRows']> =>
  ([x, index], _, [spec]) => {
    const y = gpu.output('takeRows', spec)
    const taken = {
      label: 'takeRows',
      buffers: ['x u32', 'rows i32'],
      functions: `${readBits('x', x.dtype)}
fn bits(i: u32) -> u32 {
  let width = p(1u);
  let row = rows[i / width];
  if (row < 0 || u32(row) >= p(2u)) { return 0u; }
  return x_at(u32(row) * width + i % width);
}`,
      dtype: spec.dtype,
    }
    compute(gpu, taken, [x, index].map(bufferOf), y, spec.shape, [width(x.shape, 1), x.shape[0]])
    return [y]
  }

/** For each index the position of the next equal one, or -1; and after all of them whether each is the first. Replaces float atomics, with sums in order. */
const linked: Program = {
  label: 'equal indices',
  buffers: ['rows i32', 'links* i32'],
  body: eachElement(`
  let row = rows[i];
  var next = -1;
  for (var j = i + 1u; j < p(0u); j++) { if (rows[j] == row) { next = i32(j); break; } }
  var first = 1;
  for (var j = i; j > 0u; j--) { if (rows[j - 1u] == row) { first = 0; break; } }
  links[i] = next;
  links[p(0u) + i] = first;`),
}

function links(gpu: DeviceOps, op: string, index: Value): Buffer {
  const count = countOf(index)
  const buffer = gpu.between(op, 2 * count)
  gpu.each(linked, [bufferOf(index), buffer], count)
  return buffer
}

const added = (element: string): Program => ({
  label: `scatterAddRows ${element}`,
  buffers: ['rows i32', 'links i32', `x ${element}`, `y* ${element}`],
  body: eachElement(`
  let width = p(1u);
  let count = p(3u);
  let source = i / width;
  let row = rows[source];
  if (row < 0 || u32(row) >= p(2u) || links[count + source] == 0) { return; }
  var sum = ${element}(0);
  for (var k = i32(source); k >= 0; k = links[u32(k)]) { sum += x[u32(k) * width + i % width]; }
  y[u32(row) * width + i % width] = sum;`),
})

export const scatterAddRows =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['scatterAddRows']> =>
  ([index, source], { rows }, [spec]) => {
    const y = gpu.zeros('scatterAddRows', spec)
    if (countOf(source) === 0) return [y]
    const chain = links(gpu, 'scatterAddRows', index)
    const buffers = [bufferOf(index), chain, bufferOf(source), y]
    gpu.each(added(elementOf(spec.dtype)), buffers, countOf(source), [width(spec.shape, 1), rows, countOf(index)])
    gpu.done(chain)
    return [y]
  }

const replaced = (dtype: DType): Program => ({
  label: `setRows ${dtype}`,
  buffers: ['rows i32', 'links i32', 'x u32', putsInto(dtype)],
  body: `${readBits('x', dtype)}${put(dtype)}${eachElement(`
  let width = p(1u);
  let source = i / width;
  let row = rows[source];
  if (row < 0 || u32(row) >= p(2u) || links[source] >= 0) { return; }
  put(u32(row) * width + i % width, x_at(i));`)}`,
})

export const setRows =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['setRows']> =>
  ([x, index, source], { donate }) => {
    const y = donate ? gpu.donated('setRows', x) : gpu.copied('setRows', x)
    if (countOf(source) === 0) return [y]
    const chain = links(gpu, 'setRows', index)
    const buffers = [bufferOf(index), chain, bufferOf(source), y]
    gpu.each(replaced(x.dtype), buffers, countOf(source), [width(x.shape, 1), x.shape[0]])
    gpu.done(chain)
    return [y]
  }
