/** @file Matrix products in f32. m rows, n columns, k summed over. */
import type { FusedAttrs, FusedKernel, Kernel, PrimitiveAttrs } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, type DeviceOps, eachElement } from '../device-ops.ts'
import type { Buffer } from '../memory.ts'
import { areWide, quads, readQuad, repeat } from './quads.ts'
import { eachValue, TEAM, TILE, tiled, tilesOf } from './tiles.ts'

/** Elements of a matrix that lies row by row, each `pitch` behind the one before it, from `start` on. */
export interface Placed {
  readonly buffer: Buffer
  readonly pitch: number
  readonly start?: number
  /** From one matrix of a batch to the next. */
  readonly apart?: number
}

export interface Product {
  readonly a: Placed
  readonly b: Placed
  readonly c: Placed
  readonly transposeA: boolean
  readonly transposeB: boolean
  readonly m: number
  readonly n: number
  readonly k: number
  readonly batch?: number
  /** Adds to c. */
  readonly adds?: boolean
}

/** Workgroups below which k is divided, so that a GPU has something to do. */
const FEW_TILES = 64
/** Least part of k. */
const LEAST_DEEP = 256

// Words: 0 m, 1 n, 2 k, 3 parts of k, 4 size of a part; pitch, start and distance of a, b and c from 5, 8 and 11 on; 14 whether it adds.
const product = (transposeA: boolean, transposeB: boolean, wide: boolean): Program =>
  tiled({
    label: `matmul ${transposeA} ${transposeB}`,
    buffers: ['c* f32'],
    wide,
    begin: `
  let rows = p(0u);
  let columns = p(1u);
  let row0 = group.y * ${TILE}u;
  let column0 = group.x * ${TILE}u;
  let part = group.z % p(3u);
  let k_first = part * p(4u);
  let k_end = min(p(2u), k_first + p(4u));
  let a0 = p(6u) + group.z / p(3u) * p(7u);
  let b0 = p(9u) + group.z / p(3u) * p(10u);
  let c0 = p(12u) + group.z * p(13u);`,
    left: { name: 'a', alongK: !transposeA, row: at => `a0 + ${at} * p(5u)` },
    right: { name: 'b', alongK: transposeB, row: at => `b0 + ${at} * p(8u)` },
    finish: eachValue(`
        let to = c0 + row * p(11u) + at;
        if (p(14u) == 1u) { c[to] += value; } else { c[to] = value; }`),
  })

const partsAdded: Program = {
  label: 'matmul parts',
  buffers: ['parts f32', 'c* f32'],
  body: eachElement(`
  let size = p(1u);
  let first = i / size * size * p(2u) + i % size;
  var sum = 0.0;
  for (var part = 0u; part < p(2u); part++) { sum += parts[first + part * size]; }
  c[i] = sum;`),
}

export function multiply(gpu: DeviceOps, op: string, given: Product): void {
  const { a, b, c, transposeA, transposeB, m, n, k, batch = 1, adds = false } = given
  const tiles = tilesOf(m) * tilesOf(n) * batch
  const whole = c.pitch === n && (c.start ?? 0) === 0 && !adds
  const parts =
    whole && tiles < FEW_TILES
      ? Math.max(1, Math.min(Math.floor((2 * FEW_TILES) / tiles), Math.floor(k / LEAST_DEEP)))
      : 1
  const deep = parts === 1 ? k : Math.ceil(k / parts / 16) * 16
  const to = parts === 1 ? c : { buffer: gpu.between(op, parts * batch * m * n), pitch: n, apart: m * n }
  const places = [a, b, to].flatMap(({ pitch, start = 0, apart = 0 }) => [pitch, start, apart])
  const wide = areWide(...places.slice(0, 6))
  const buffers = [a.buffer, b.buffer, to.buffer]
  const words = [m, n, k, parts, deep, ...places, Number(adds)]
  gpu.launch(product(transposeA, transposeB, wide), buffers, words, [tilesOf(n), tilesOf(m), batch * parts])
  if (parts === 1) return
  gpu.each(partsAdded, [to.buffer, c.buffer], batch * m * n, [m * n, parts])
  gpu.done(to.buffer)
}

/** Rows that are taken together where weights are read once and nothing else matters, as in decoding. */
const FEW_ROWS = 4

interface RowProduct {
  readonly label: string
  /** `x`, `w`, then these. */
  readonly buffers: readonly string[]
  readonly transposeW: boolean
  readonly wide: boolean
  readonly functions?: string
  /** WGSL: sets `rows` (at most 4), `columns`, `deep`, `x0`, `w0` and `y0`, where the three begin, alike in all threads. */
  readonly begin: string
}

/**
 * A few rows times a matrix: bound by how fast that is read. Where it lies along k, 16 threads share a column; else 32 threads have 4 neighbouring columns each, and four
 * of these teams share k.
 */
function fewRows({ label, buffers, transposeW, wide, functions = '', begin }: RowProduct): Program {
  const head = `${functions}${readQuad('x', wide)}${readQuad('w', wide)}
var<workgroup> parts: array<vec4<f32>, ${transposeW ? TEAM : FEW_ROWS * TEAM}>;
@compute @workgroup_size(${TEAM})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
${begin}`
  // A component for each row.
  const alongK = `
  let column = group.x * 8u + thread / 16u;
  let lane = thread % 16u;
  var sum = vec4<f32>();
  for (var k = lane * 4u; k < deep; k += 64u) {
    let weights = w4(w0 + column * deep, k, select(0u, deep, column < columns));${repeat(
      FEW_ROWS,
      row => `
    if (${row}u < rows) { sum[${row}] += dot(weights, x4(x0 + ${row}u * deep, k, deep)); }`,
    )}
  }
  parts[thread] = sum;
  for (var step = 8u; step > 0u; step >>= 1u) {
    workgroupBarrier();
    if (lane < step) { parts[thread] += parts[thread + step]; }
  }
  if (lane == 0u && column < columns) {
    for (var row = 0u; row < rows; row++) { y[y0 + row * columns + column] = parts[thread][row]; }
  }`
  const alongColumns = `
  let column = group.x * 128u + thread % 32u * 4u;
${repeat(
  FEW_ROWS,
  row => `
  var sum${row} = vec4<f32>();`,
)}
  for (var k = thread / 32u * 4u; k < deep; k += 16u) {${repeat(
    4,
    c => `
    let weights${c} = w4(w0 + (k + ${c}u) * columns, column, select(0u, columns, k + ${c}u < deep));`,
  )}${repeat(
    FEW_ROWS,
    row => `
    if (${row}u < rows) {
      let own = x4(x0 + ${row}u * deep, k, deep);
      sum${row} += (own.x * weights0 + own.y * weights1) + (own.z * weights2 + own.w * weights3);
    }`,
  )}
  }${repeat(
    FEW_ROWS,
    row => `
  parts[${row * TEAM}u + thread] = sum${row};`,
  )}
  workgroupBarrier();
  let row = thread / 32u;
  if (row < rows) {
    let at = row * ${TEAM}u + thread % 32u;
    let sum = (parts[at] + parts[at + 32u]) + (parts[at + 64u] + parts[at + 96u]);
    for (var c = 0u; c < 4u; c++) {
      if (column + c < columns) { y[y0 + row * columns + column + c] = sum[c]; }
    }
  }`
  return {
    label: `${label} ${transposeW} ${wide ? 'wide' : 'narrow'}`,
    buffers: [quads('x', wide), quads('w', wide), ...buffers],
    body: `${head}${transposeW ? alongK : alongColumns}
}`,
  }
}

/** Columns of a workgroup of `fewRows`. */
const columnsOf = (transposeW: boolean) => (transposeW ? 8 : 128)

// Words: 0 rows, 1 columns, 2 k.
const fewRowsProduct = (transposeW: boolean, wide: boolean): Program =>
  fewRows({
    label: 'matmul of few rows',
    buffers: ['y* f32'],
    transposeW,
    wide,
    begin: `
  let rows = p(0u);
  let columns = p(1u);
  let deep = p(2u);
  let x0 = group.z * rows * deep;
  let w0 = group.z * columns * deep;
  let y0 = group.z * rows * columns;`,
  })

export const matmul =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['matmul']> =>
  ([a, b], { transposeA, transposeB }, [spec]) => {
    const y = gpu.output('matmul', spec)
    const [m, n] = spec.shape.slice(-2)
    const batch = spec.shape.length === 3 ? spec.shape[0] : 1
    const k = a.shape[a.shape.length - (transposeA ? 2 : 1)]
    if (m <= FEW_ROWS && !transposeA) {
      const wide = areWide(k, transposeB ? k : n)
      const groups = [Math.ceil(n / columnsOf(transposeB)), 1, batch]
      gpu.launch(fewRowsProduct(transposeB, wide), [bufferOf(a), bufferOf(b), y], [m, n, k], m === 0 ? [0] : groups)
      return [y]
    }
    multiply(gpu, 'matmul', {
      a: { buffer: bufferOf(a), pitch: transposeA ? m : k, apart: m * k },
      b: { buffer: bufferOf(b), pitch: transposeB ? k : n, apart: n * k },
      c: { buffer: y, pitch: n, apart: m * n },
      ...{ transposeA, transposeB, m, n, k, batch },
    })
    return [y]
  }

/**
 * WGSL: `expert_at`, of whose [first, end) `from` is a part, is found by all threads together; offsets[experts] .. total are the rows of nobody, which are expert
 * p(2)'s.
 */
const expertWhere = (condition: string) => `
var<workgroup> found: u32;
fn begin_of(expert: u32) -> u32 { return select(p(3u), u32(offsets[min(expert, p(2u))]), expert <= p(2u)); }
fn expert_at(wanted: u32, thread: u32) -> u32 {
  for (var expert = thread; expert <= p(2u); expert += ${TEAM}u) {
    if (${condition}) { found = expert; }
  }
  return workgroupUniformLoad(&found);
}`

/** Tile t of rows is of the expert whose tiles, counted from offset / 64 + expert on, it is among: each has as many as its rows need or one more. */
const tileOf = `
fn first_tile(expert: u32) -> u32 { return begin_of(expert) / ${TILE}u + expert; }`

// Words: 0 n, 1 k, 2 experts, 3 rows in all.
const grouped = (transposeW: boolean, wide: boolean): Program =>
  tiled({
    label: `groupedMatmul ${transposeW}`,
    buffers: ['offsets i32', 'y* f32'],
    wide,
    functions: `${expertWhere('first_tile(expert) <= wanted && wanted < first_tile(expert + 1u)')}${tileOf}`,
    begin: `
  let expert = expert_at(group.y, thread);
  let columns = p(0u);
  let pitch = p(1u);
  let k_first = 0u;
  let k_end = select(pitch, 0u, expert == p(2u));
  let row0 = begin_of(expert) + (group.y - first_tile(expert)) * ${TILE}u;
  let rows = begin_of(expert + 1u);
  if (row0 >= rows) { return; }
  let column0 = group.x * ${TILE}u;
  let w0 = expert * columns * pitch;`,
    left: { name: 'x', alongK: true, row: at => `${at} * pitch` },
    right: { name: 'w', alongK: transposeW, row: at => `w0 + ${at} * ${transposeW ? 'pitch' : 'columns'}` },
    finish: eachValue('y[row * columns + at] = value;'),
  })

const groupedRow = (transposeW: boolean, wide: boolean): Program =>
  fewRows({
    label: 'groupedMatmul of few rows',
    buffers: ['offsets i32', 'y* f32'],
    transposeW,
    wide,
    functions: expertWhere('begin_of(expert) <= wanted && wanted < begin_of(expert + 1u)'),
    begin: `
  let expert = expert_at(group.y, thread);
  let rows = 1u;
  let columns = p(0u);
  let deep = select(p(1u), 0u, expert == p(2u));
  let x0 = group.y * p(1u);
  let w0 = expert * columns * p(1u);
  let y0 = group.y * columns;`,
  })

/** Rows of `groupedMatmul` up to which each reads the weight of its expert for itself: most have one of their own. */
const FEW_GROUPED_ROWS = 16

export const groupedMatmul =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['groupedMatmul']> =>
  ([x, weight, offsets], { transposeW }, [spec]) => {
    const y = gpu.output('groupedMatmul', spec)
    const [experts] = weight.shape
    const [rows, inner] = x.shape
    const [, n] = spec.shape
    if (rows === 0 || n === 0) return [y]
    const buffers = [...[x, weight, offsets].map(bufferOf), y]
    const wide = areWide(inner, transposeW ? inner : n)
    const words = [n, inner, experts, rows]
    if (rows <= FEW_GROUPED_ROWS) {
      gpu.launch(groupedRow(transposeW, wide), buffers, words, [Math.ceil(n / columnsOf(transposeW)), rows])
    } else {
      const tiles = Math.floor(rows / TILE) + experts + 1
      gpu.launch(grouped(transposeW, wide), buffers, words, [tilesOf(n), tiles])
    }
    return [y]
  }

// Words: 0 n, 1 k.
const weightGradient = (wide: boolean): Program =>
  tiled({
    label: 'groupedMatmulWeightGrad',
    buffers: ['offsets i32', 'dw* f32'],
    wide,
    begin: `
  let rows = p(0u);
  let columns = p(1u);
  let first = u32(offsets[group.z]);
  let k_first = 0u;
  let k_end = u32(offsets[group.z + 1u]) - first;
  let row0 = group.y * ${TILE}u;
  let column0 = group.x * ${TILE}u;`,
    left: { name: 'dy', alongK: false, row: at => `(first + ${at}) * rows` },
    right: { name: 'x', alongK: false, row: at => `(first + ${at}) * columns` },
    finish: eachValue('dw[(group.z * rows + row) * columns + at] = value;'),
  })

export const groupedMatmulWeightGrad =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['groupedMatmulWeightGrad']> =>
  ([x, dy, offsets], _, [spec]) => {
    const y = gpu.output('groupedMatmulWeightGrad', spec)
    const [experts, n, k] = spec.shape
    const buffers = [...[dy, x, offsets].map(bufferOf), y]
    gpu.launch(weightGradient(areWide(n, k)), buffers, [n, k], [tilesOf(k), tilesOf(n), experts])
    return [y]
  }
