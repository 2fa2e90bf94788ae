/**
 * @file Matrix products in f32: tiles of 64 x 64 by 256 threads, each with 4 x 4 sums; both operands go through workgroup memory 16 deep.
 * m rows, n columns, k summed over.
 */
import type { FusedAttrs, FusedKernel, Kernel, PrimitiveAttrs } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, type DeviceOps } from '../device-ops.ts'

const TILE = 64
const DEEP = 16

interface Operand {
  /** WGSL: element (`outer`, `k`) of the operand; `outer` counts rows of the tile's matrix for the left one, columns for the right one. */
  readonly at: string
  /** Whether neighbours along k are neighbours in memory. */
  readonly alongK: boolean
}

interface TiledProduct {
  readonly label: string
  readonly buffers: readonly string[]
  /** WGSL: sets `row0`, `column0` (of the tile), `rows`, `columns` (where they end) and `deep`, or returns, alike in all threads. */
  readonly begin: string
  readonly left: Operand
  readonly right: Operand
  /** WGSL: stores `value` for `row`, `column`. */
  readonly store: string
}

/** Which (outer, k) of a tile each thread brings: neighbours bring what are neighbours in memory. */
const bring = (name: string, { at, alongK }: Operand, first: string, end: string) => `
    for (var part = thread; part < ${TILE * DEEP}u; part += 256u) {
      let inner = ${alongK ? `part % ${DEEP}u` : `part / ${TILE}u`};
      let outer_in_tile = ${alongK ? `part / ${DEEP}u` : `part % ${TILE}u`};
      let outer = ${first} + outer_in_tile;
      let k = k0 + inner;
      var value = 0.0;
      if (outer < ${end} && k < deep) { value = ${at}; }
      ${name}[inner * ${TILE}u + outer_in_tile] = value;
    }`

const tiled = ({ label, buffers, begin, left, right, store }: TiledProduct): Program => ({
  label,
  buffers,
  body: `
var<workgroup> lefts: array<f32, ${TILE * DEEP}>;
var<workgroup> rights: array<f32, ${TILE * DEEP}>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
${begin}
  let down = thread / 16u * 4u;
  let along = thread % 16u * 4u;
  var sums: array<vec4<f32>, 4>;
  for (var k0 = 0u; k0 < deep; k0 += ${DEEP}u) {
${bring('lefts', left, 'row0', 'rows')}
${bring('rights', right, 'column0', 'columns')}
    workgroupBarrier();
    for (var k = 0u; k < ${DEEP}u; k++) {
      let l = k * ${TILE}u + down;
      let r = k * ${TILE}u + along;
      let b = vec4<f32>(rights[r], rights[r + 1u], rights[r + 2u], rights[r + 3u]);
      sums[0] += lefts[l] * b;
      sums[1] += lefts[l + 1u] * b;
      sums[2] += lefts[l + 2u] * b;
      sums[3] += lefts[l + 3u] * b;
    }
    workgroupBarrier();
  }
  for (var i = 0u; i < 4u; i++) {
    for (var j = 0u; j < 4u; j++) {
      let row = row0 + down + i;
      let column = column0 + along + j;
      let value = sums[i][j];
      if (row < rows && column < columns) { ${store} }
    }
  }
}`,
})

const tiles = (size: number) => Math.ceil(size / TILE)

const product = (transposeA: boolean, transposeB: boolean): Program =>
  tiled({
    label: `matmul ${transposeA} ${transposeB}`,
    buffers: ['a f32', 'b f32', 'c* f32'],
    begin: `
  let rows = p(0u);
  let columns = p(1u);
  let deep = p(2u);
  let row0 = group.y * ${TILE}u;
  let column0 = group.x * ${TILE}u;
  let a0 = group.z * rows * deep;
  let b0 = group.z * columns * deep;`,
    left: { at: transposeA ? 'a[a0 + k * rows + outer]' : 'a[a0 + outer * deep + k]', alongK: !transposeA },
    right: { at: transposeB ? 'b[b0 + outer * deep + k]' : 'b[b0 + k * columns + outer]', alongK: transposeB },
    store: 'c[(group.z * rows + row) * columns + column] = value;',
  })

export const matmul =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['matmul']> =>
  ([a, b], { transposeA, transposeB }, [spec]) => {
    const y = gpu.output('matmul', spec)
    const [m, n] = spec.shape.slice(-2)
    const batch = spec.shape.length === 3 ? spec.shape[0] : 1
    const k = a.shape[a.shape.length - (transposeA ? 2 : 1)]
    gpu.launch(product(transposeA, transposeB), [bufferOf(a), bufferOf(b), y], [m, n, k], [tiles(n), tiles(m), batch])
    return [y]
  }

/** WGSL: the expert of tile `group.y` of rows, where each expert's rows begin a tile of their own. Rows of an expert are few or many, and only the device knows. */
const expertOfTile = `
  var tile = group.y;
  var expert = 0u;
  for (; expert < p(2u); expert++) {
    let own = (u32(offsets[expert + 1u] - offsets[expert]) + ${TILE - 1}u) / ${TILE}u;
    if (tile < own) { break; }
    tile -= own;
  }
  if (expert == p(2u)) { return; }`

const grouped = (transposeW: boolean): Program =>
  tiled({
    label: `groupedMatmul ${transposeW}`,
    buffers: ['x f32', 'w f32', 'offsets i32', 'y* f32'],
    begin: `${expertOfTile}
  let columns = p(0u);
  let deep = p(1u);
  let row0 = u32(offsets[expert]) + tile * ${TILE}u;
  let rows = u32(offsets[expert + 1u]);
  let column0 = group.x * ${TILE}u;
  let w0 = expert * columns * deep;`,
    left: { at: 'x[outer * deep + k]', alongK: true },
    right: { at: transposeW ? 'w[w0 + outer * deep + k]' : 'w[w0 + k * columns + outer]', alongK: transposeW },
    store: 'y[row * columns + column] = value;',
  })

export const groupedMatmul =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['groupedMatmul']> =>
  ([x, weight, offsets], { transposeW }, [spec]) => {
    const [experts] = weight.shape
    const [rows, inner] = x.shape
    const [, n] = spec.shape
    const y = gpu.zeros('groupedMatmul', spec)
    const buffers = [bufferOf(x), bufferOf(weight), bufferOf(offsets), y]
    gpu.launch(grouped(transposeW), buffers, [n, inner, experts], [tiles(n), rows === 0 ? 0 : tiles(rows) + experts])
    return [y]
  }

const weightGradient: Program = tiled({
  label: 'groupedMatmulWeightGrad',
  buffers: ['x f32', 'dy f32', 'offsets i32', 'dw* f32'],
  begin: `
  let rows = p(0u);
  let columns = p(1u);
  let first = u32(offsets[group.z]);
  let deep = u32(offsets[group.z + 1u]) - first;
  let row0 = group.y * ${TILE}u;
  let column0 = group.x * ${TILE}u;`,
  left: { at: 'dy[(first + k) * rows + outer]', alongK: false },
  right: { at: 'x[(first + k) * columns + outer]', alongK: false },
  store: 'dw[(group.z * rows + row) * columns + column] = value;',
})

export const groupedMatmulWeightGrad =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['groupedMatmulWeightGrad']> =>
  ([x, dy, offsets], _, [spec]) => {
    const y = gpu.output('groupedMatmulWeightGrad', spec)
    const [experts, n, k] = spec.shape
    gpu.launch(weightGradient, [bufferOf(x), bufferOf(dy), bufferOf(offsets), y], [n, k], [tiles(k), tiles(n), experts])
    return [y]
  }
