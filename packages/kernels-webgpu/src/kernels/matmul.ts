/** @file Matrix products in f32. m rows, n columns, summed over k. */
import type { FusedAttrs, FusedKernel, Handle, Kernel, PrimitiveAttrs, TensorSpec, Value } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, type DeviceOps, eachElement } from '../device-ops.ts'
import { areWide, quads, readQuad, repeat } from './quads.ts'
import { eachValue, TEAM, TILE, tiled, tilesOf } from './tiles.ts'
import { type Placed, plain, stored, type Weight, type WeightText, weightText } from './weights.ts'

export interface Product {
  readonly a: Placed
  readonly b: Weight
  readonly c: Placed
  readonly transposeA: boolean
  readonly transposeB: boolean
  readonly m: number
  readonly n: number
  readonly k: number
  readonly batch?: number
  /** Adds the product to c. */
  readonly adds?: boolean
}

/** With fewer workgroups, k is split, to keep the GPU busy. */
const FEW_TILES = 64
/** Minimum length of a part of k. */
const LEAST_DEEP = 256
/** The number of workgroups that any device supports along an axis. Tests make it small. */
export const limits = { groups: 65_535 }

/** Launches for `batch` matrices, as many at once as a device supports. */
export function eachMatrices(batch: number, launch: (first: number, count: number) => void): void {
  const { groups } = limits
  for (let first = 0; first < batch; first += groups) launch(first, Math.min(groups, batch - first))
}

// Words: 0 m, 1 n, 2 k, 3 parts of k, 4 size of a part; pitch, start and stride between matrices of a and c from 5 and 8 on; 11 whether to add; 12 first matrix; then the weight's.
const product = (transposeA: boolean, transposeB: boolean, format: Weight['format'], wide: boolean): Program => {
  const weight = weightText(format, wide, 13)
  return tiled({
    label: `matmul ${format} ${transposeA} ${transposeB}`,
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
  let matrix = p(12u) + group.z / p(3u);
  let a0 = p(6u) + matrix * p(7u);
  let c0 = p(9u) + (matrix * p(3u) + part) * p(10u);`,
    left: { name: 'a', alongK: !transposeA, row: at => `a0 + ${at} * p(5u)` },
    right: { name: 'w', reads: weight, alongK: transposeB, row: at => weight.row(at, 'matrix') },
    finish: eachValue(`
        let to = c0 + row * p(8u) + at;
        if (p(11u) == 1u) { c[to] += value; } else { c[to] = value; }`),
  })
}

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
  const places = [a, to].flatMap(({ pitch, start = 0, apart = 0 }) => [pitch, start, apart])
  const wide = b.wide && areWide(...places.slice(0, 3))
  const buffers = [a.buffer, ...b.buffers, to.buffer]
  const program = product(transposeA, transposeB, b.format, wide)
  // k is only split if there are few matrices.
  eachMatrices(batch, (first, count) => {
    const words = [m, n, k, parts, deep, ...places, Number(adds), first, ...b.words]
    gpu.launch(program, buffers, words, [tilesOf(n), tilesOf(m), count * parts])
  })
  if (parts === 1) return
  gpu.each(partsAdded, [to.buffer, c.buffer], batch * m * n, [m * n, parts])
  gpu.done(to.buffer)
}

/** Rows computed together when reading the weights dominates, as in decoding. */
const FEW_ROWS = 4

interface RowProduct {
  readonly label: string
  readonly weight: WeightText
  /** Buffers other than `x` and the weight's, which come first. */
  readonly buffers: readonly string[]
  readonly transposeW: boolean
  readonly wide: boolean
  readonly functions?: string
  /** WGSL: sets `rows` (at most 4), `columns`, `deep`, `x0` and `y0` (offsets of x and y), and `matrix` (index of the weight's matrix); the same in all threads. */
  readonly begin: string
}

/**
 * A few rows times a matrix; the time is that of reading the matrix. If the matrix is contiguous along k, 32 threads share four columns, so that four loads of the matrix use
 * one load of x. Otherwise 32 threads have 4 adjacent columns each, and four such teams share k.
 */
function fewRows({ label, weight, buffers, transposeW, wide, functions = '', begin }: RowProduct): Program {
  const head = `${functions}${readQuad('x', wide)}${weight.functions}
var<workgroup> parts: array<vec4<f32>, ${4 * TEAM}>;
@compute @workgroup_size(${TEAM})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
${begin}`
  // One component per row.
  const alongK = `
  let column = group.x * 16u + thread / 32u * 4u;
  let lane = thread % 32u;${repeat(
    4,
    c => `
  var sum${c} = vec4<f32>();`,
  )}
  for (var k = lane * 4u; k < deep; k += 128u) {${repeat(
    4,
    c => `
    let weights${c} = w4(${weight.row(`(column + ${c}u)`, 'matrix')}, k, select(0u, deep, column + ${c}u < columns));`,
  )}${repeat(
    FEW_ROWS,
    row => `
    if (${row}u < rows) {
      let own = x4(x0 + ${row}u * deep, k, deep);${repeat(
        4,
        c => `
      sum${c}[${row}] += dot(weights${c}, own);`,
      )}
    }`,
  )}
  }${repeat(
    4,
    c => `
  parts[${c * TEAM}u + thread] = sum${c};`,
  )}
  for (var step = 16u; step > 0u; step >>= 1u) {
    workgroupBarrier();
    if (lane < step) {${repeat(
      4,
      c => `
      parts[${c * TEAM}u + thread] += parts[${c * TEAM}u + thread + step];`,
    )}
    }
  }
  workgroupBarrier();
  if (lane < 4u && column + lane < columns) {
    let sum = parts[lane * ${TEAM}u + thread - lane];
    for (var row = 0u; row < rows; row++) { y[y0 + row * columns + column + lane] = sum[row]; }
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
    let weights${c} = w4(${weight.row(`(k + ${c}u)`, 'matrix')}, column, select(0u, columns, k + ${c}u < deep));`,
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
    buffers: [quads('x', wide), ...weight.buffers, ...buffers],
    body: `${head}${transposeW ? alongK : alongColumns}
}`,
  }
}

/** Columns per workgroup of `fewRows`. */
const columnsOf = (transposeW: boolean) => (transposeW ? 16 : 128)

// Words: 0 rows, 1 columns, 2 k, 3 first matrix, then the weight's.
const fewRowsProduct = (transposeW: boolean, format: Weight['format'], wide: boolean): Program =>
  fewRows({
    label: `matmul of few rows ${format}`,
    weight: weightText(format, wide, 4),
    buffers: ['y* f32'],
    transposeW,
    wide,
    begin: `
  let rows = p(0u);
  let columns = p(1u);
  let deep = p(2u);
  let matrix = p(3u) + group.z;
  let x0 = matrix * rows * deep;
  let y0 = matrix * rows * columns;`,
  })

interface RowsByWeight {
  readonly op: string
  readonly x: Value
  readonly weight: Weight
  readonly transposeA: boolean
  readonly transposeB: boolean
  readonly spec: TensorSpec
}

function rowsByWeight(gpu: DeviceOps, { op, x, weight, transposeA, transposeB, spec }: RowsByWeight): Handle[] {
  const y = gpu.output(op, spec)
  const [m, n] = spec.shape.slice(-2)
  const batch = spec.shape.length === 3 ? spec.shape[0] : 1
  const k = x.shape[x.shape.length - (transposeA ? 2 : 1)]
  const teams = m === 0 ? 0 : Math.ceil(n / columnsOf(transposeB))
  if (m <= FEW_ROWS && !transposeA && teams <= limits.groups) {
    const wide = weight.wide && areWide(k)
    const buffers = [bufferOf(x), ...weight.buffers, y]
    const program = fewRowsProduct(transposeB, weight.format, wide)
    eachMatrices(batch, (first, count) => {
      gpu.launch(program, buffers, [m, n, k, first, ...weight.words], [teams, 1, count])
    })
    return [y]
  }
  multiply(gpu, op, {
    a: { buffer: bufferOf(x), pitch: transposeA ? m : k, apart: m * k },
    b: weight,
    c: { buffer: y, pitch: n, apart: m * n },
    ...{ transposeA, transposeB, m, n, k, batch },
  })
  return [y]
}

export const matmul =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['matmul']> =>
  ([a, b], { transposeA, transposeB }, [spec]) => {
    const [rows, columns] = b.shape.slice(-2)
    const weight = plain({ buffer: bufferOf(b), pitch: columns, apart: rows * columns })
    return rowsByWeight(gpu, { op: 'matmul', x: a, weight, transposeA, transposeB, spec })
  }

export const quantizedMatmul =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['quantizedMatmul']> =>
  ([x, q, scale], attrs, [spec]) =>
    rowsByWeight(gpu, {
      op: 'quantizedMatmul',
      x,
      weight: stored(q, scale, attrs),
      transposeA: false,
      transposeB: attrs.transposeW,
      spec,
    })

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

// Words: 0 n, 1 k, 2 experts, 3 total rows, then the weight's.
const grouped = (transposeW: boolean, format: Weight['format'], wide: boolean): Program => {
  const weight = weightText(format, wide, 4)
  return tiled({
    label: `groupedMatmul ${format} ${transposeW}`,
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
  let column0 = group.x * ${TILE}u;`,
    left: { name: 'x', alongK: true, row: at => `${at} * pitch` },
    right: { name: 'w', reads: weight, alongK: transposeW, row: at => weight.row(at, 'expert') },
    finish: eachValue('y[row * columns + at] = value;'),
  })
}

const groupedRow = (transposeW: boolean, format: Weight['format'], wide: boolean): Program =>
  fewRows({
    label: `groupedMatmul of few rows ${format}`,
    weight: weightText(format, wide, 4),
    buffers: ['offsets i32', 'y* f32'],
    transposeW,
    wide,
    functions: expertWhere('begin_of(expert) <= wanted && wanted < begin_of(expert + 1u)'),
    begin: `
  let matrix = expert_at(group.y, thread);
  let rows = 1u;
  let columns = p(0u);
  let deep = select(p(1u), 0u, matrix == p(2u));
  let x0 = group.y * p(1u);
  let y0 = group.y * columns;`,
  })

/** Up to this many rows, or one per expert, each row reads its expert's weight separately: most rows then have an expert of their own. */
const FEW_GROUPED_ROWS = 16

interface RowsByExpert {
  readonly op: string
  readonly x: Value
  readonly weight: Weight
  readonly offsets: Value
  readonly transposeW: boolean
  readonly spec: TensorSpec
}

function rowsByExpert(gpu: DeviceOps, { op, x, weight, offsets, transposeW, spec }: RowsByExpert): Handle[] {
  const y = gpu.output(op, spec)
  const experts = offsets.shape[0] - 1
  const [rows, inner] = x.shape
  const [, n] = spec.shape
  if (rows === 0 || n === 0) return [y]
  const buffers = [bufferOf(x), ...weight.buffers, bufferOf(offsets), y]
  const wide = weight.wide && areWide(inner)
  const words = [n, inner, experts, rows, ...weight.words]
  if (rows <= Math.max(FEW_GROUPED_ROWS, experts)) {
    gpu.launch(groupedRow(transposeW, weight.format, wide), buffers, words, [
      Math.ceil(n / columnsOf(transposeW)),
      rows,
    ])
  } else {
    const tiles = Math.floor(rows / TILE) + experts + 1
    gpu.launch(grouped(transposeW, weight.format, wide), buffers, words, [tilesOf(n), tiles])
  }
  return [y]
}

export const groupedMatmul =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['groupedMatmul']> =>
  ([x, w, offsets], { transposeW }, [spec]) => {
    const [, rows, columns] = w.shape
    const weight = plain({ buffer: bufferOf(w), pitch: columns, apart: rows * columns })
    return rowsByExpert(gpu, { op: 'groupedMatmul', x, weight, offsets, transposeW, spec })
  }

export const quantizedGroupedMatmul =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['quantizedGroupedMatmul']> =>
  ([x, q, offsets, scale], attrs, [spec]) =>
    rowsByExpert(gpu, {
      op: 'quantizedGroupedMatmul',
      x,
      weight: stored(q, scale, attrs),
      offsets,
      transposeW: attrs.transposeW,
      spec,
    })

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
