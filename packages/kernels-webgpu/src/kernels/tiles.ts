/**
 * @file Matrix products in tiles of 64 x 64 by 128 threads, each with 8 rows of 4 columns in registers. Both operands go through workgroup memory, 16 steps of k at a time, in
 * vectors of four rows (left) or columns (right), so that 3 reads of 16 bytes serve 32 products. Half of the threads load a 4 x 4 block each of the left operand, half
 * of the right one.
 */
import type { Program } from '../commands.ts'
import { quads, readQuad, repeat } from './quads.ts'

/** Rows and columns of a tile. */
export const TILE = 64
/** Threads per workgroup. */
export const TEAM = 128

export const tilesOf = (size: number): number => Math.ceil(size / TILE)

/** A matrix whose rows in memory are the product's rows (left operand), its columns (right operand), or steps of k. */
export interface Operand {
  /** The function that reads it, `<name>4`: that of `readQuad`, unless `reads` declares another one with its buffers. */
  readonly name: string
  readonly reads?: { readonly buffers: readonly string[]; readonly functions: string }
  /** Whether elements are contiguous along k. */
  readonly alongK: boolean
  /** WGSL: the offset of row `at`. */
  row(at: string): string
}

/** A product, and what to do with its result. */
export interface TiledProduct {
  readonly label: string
  /** Buffers other than the operands', which come first. */
  readonly buffers: readonly string[]
  /** Whether rows of both operands are read as vectors; see quads.ts. */
  readonly wide: boolean
  readonly functions?: string
  /** WGSL: sets `row0` and `column0` (start of the tile), `rows` and `columns` (their ends), `k_first` (a multiple of 16) and `k_end`, or returns; the same in all threads. */
  readonly begin: string
  readonly left: Operand
  readonly right: Operand
  /** WGSL: uses the sums `sum0` to `sum7`, of the rows `row_of(i)` and the columns from `column` on. */
  readonly finish: string
}

/** A block of four `outer` by four `k`: vectors along `outer`, one for each k. */
function block({ name, alongK, row }: Operand, outer: string, end: string): string {
  const vectors = [0, 1, 2, 3].map(c =>
    alongK
      ? `${name}4(${row(`(${outer} + ${c}u)`)}, k, select(0u, k_end, ${outer} + ${c}u < ${end}))`
      : `${name}4(${row(`(k + ${c}u)`)}, ${outer}, select(0u, ${end}, k + ${c}u < k_end))`,
  )
  const matrix = `mat4x4<f32>(${vectors.join(', ')})`
  return alongK ? `transpose(${matrix})` : matrix
}

const readsOf = ({ name, reads }: Operand, wide: boolean) =>
  reads ?? { buffers: [quads(name, wide)], functions: readQuad(name, wide) }

export const tiled = ({ label, buffers, wide, functions = '', begin, left, right, finish }: TiledProduct): Program => ({
  label: `${label} ${wide ? 'wide' : 'narrow'}`,
  buffers: [...readsOf(left, wide).buffers, ...readsOf(right, wide).buffers, ...buffers],
  body: `${functions}${readsOf(left, wide).functions}${readsOf(right, wide).functions}
var<workgroup> lefts: array<vec4<f32>, 256>;
var<workgroup> rights: array<vec4<f32>, 256>;
@compute @workgroup_size(${TEAM})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
${begin}
  let down = thread / 16u;
  let along = thread % 16u;
  let outer_at = thread % 16u * 4u;
  let k_at = thread % 64u / 16u * 4u;${repeat(
    8,
    i => `
  var sum${i} = vec4<f32>();`,
  )}
  for (var k0 = k_first; k0 < k_end; k0 += 16u) {
    let k = k0 + k_at;
    workgroupBarrier();
    // Variables, because not every compiler supports indexing the columns of a value.
    if (thread < 64u) {
      let outer = row0 + outer_at;
      var block = ${block(left, 'outer', 'rows')};
      for (var c = 0u; c < 4u; c++) { lefts[(k_at + c) * 16u + along] = block[c]; }
    } else {
      let outer = column0 + outer_at;
      var block = ${block(right, 'outer', 'columns')};
      for (var c = 0u; c < 4u; c++) { rights[(k_at + c) * 16u + along] = block[c]; }
    }
    workgroupBarrier();
    for (var n = 0u; n < 16u; n++) {
      let upper = lefts[n * 16u + down];
      let lower = lefts[n * 16u + 8u + down];
      let b = rights[n * 16u + along];${repeat(
        4,
        i => `
      sum${i} += upper[${i}] * b;`,
      )}${repeat(
        4,
        i => `
      sum${i + 4} += lower[${i}] * b;`,
      )}
    }
  }
  let column = column0 + 4u * along;
${finish}
}`,
})

/** WGSL: the row of `sum<i>`. */
export const rowOf = (i: number): string => `(row0 + ${i < 4 ? 0 : 32}u + 4u * down + ${i % 4}u)`

/** WGSL that stores each element `value` of `row` at column `at`, up to column `end`; for `finish`. */
export const eachValue = (store: string, end = 'columns'): string =>
  repeat(
    8,
    i => `
  if (${rowOf(i)} < rows) {
    let row = ${rowOf(i)};
    for (var lane = 0u; lane < 4u; lane++) {
      let at = column + lane;
      let value = sum${i}[lane];
      if (at < ${end}) { ${store} }
    }
  }`,
  )
