/**
 * @file The scores by which sparse attention selects keys. The rows of a tile are all heads of one or several queries, whose products with 64 keys are weighted and added before
 * they leave the workgroup. T queries, J heads, D features, S keys.
 */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, type DeviceOps } from '../device-ops.ts'
import { special } from './math.ts'
import { eachMatrices } from './matmul.ts'
import { areWide, repeat } from './quads.ts'
import { rowOf, TEAM, TILE, tiled, tilesOf } from './tiles.ts'

/** WGSL: half of the weighted products, those of 32 keys, go through the workgroup memory of the operands, a row in 8 vectors. */
const half = (first: number) => `
  workgroupBarrier();
  if (along / 8u == ${first / 8}u) {${repeat(
    8,
    i => `
    ${i < 4 ? 'lefts' : 'rights'}[(4u * down + ${i % 4}u) * 8u + along % 8u] = weighted(sum${i}, ${rowOf(i)}, rows);`,
  )}
  }
  workgroupBarrier();
  for (var n = thread; n < queries * 8u; n += ${TEAM}u) {
    var score = vec4<f32>();
    let end = (n / 8u + 1u) * heads;
    for (var row = n / 8u * heads; row < end; row++) {
      score += select(rights[(row % 32u) * 8u + n % 8u], lefts[(row % 32u) * 8u + n % 8u], row < 32u);
    }
    let query = row0 / heads + n / 8u;
    for (var lane = 0u; lane < 4u; lane++) {
      let key = column0 + (${first}u + n % 8u) * 4u + lane;
      if (key < columns) { scores[query * columns + key] = select(-inf(), score[lane], is_seen(query, key)); }
    }
  }`

// Words: 0 T, 1 J, 2 D, 3 S, 4 queries per tile, 5 first text.
const program = (limited: boolean, wide: boolean): Program =>
  tiled({
    label: `indexScores ${limited}`,
    buffers: ['weights f32', ...(limited ? ['limits i32'] : []), 'scores* f32'],
    wide,
    functions: `${special}
fn rectified(x: f32) -> f32 { return select(max(x, 0.0), x, is_nan(x)); }
fn weighted(x: vec4<f32>, row: u32, rows: u32) -> vec4<f32> {
  if (row >= rows) { return vec4<f32>(); }
  return vec4<f32>(rectified(x.x), rectified(x.y), rectified(x.z), rectified(x.w)) * weights[row];
}
fn is_seen(query: u32, key: u32) -> bool { return ${limited ? 'i32(key) < limits[query]' : 'true'}; }`,
    // Rows and queries are counted across texts.
    begin: `
  let heads = p(1u);
  let columns = p(3u);
  let text = p(5u) + group.z;
  let first_query = group.y * p(4u);
  let queries = min(p(4u), p(0u) - first_query);
  let row0 = (text * p(0u) + first_query) * heads;
  let rows = row0 + queries * heads;
  let column0 = group.x * ${TILE}u;
  let k_first = 0u;
  ${
    limited
      ? `var most = 0;
  for (var n = 0u; n < queries; n++) { most = max(most, limits[text * p(0u) + first_query + n]); }
  // Products with keys that no query of the tile sees are not computed.
  let k_end = select(0u, p(2u), i32(column0) < most);`
      : 'let k_end = p(2u);'
  }`,
    left: { name: 'q', alongK: true, row: at => `${at} * p(2u)` },
    right: { name: 'k', alongK: true, row: at => `(text * columns + ${at}) * p(2u)` },
    finish: half(0) + half(8),
  })

export const indexScores =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['indexScores']> =>
  ([q, weights, keys, limits], _, [spec]) => {
    const [batch, time, heads, features] = q.shape
    const count = keys.shape[1]
    if (heads === 0 || heads > TILE) return undefined
    const scores = gpu.output('indexScores', spec)
    if (batch * time * count === 0) return [scores]
    const queries = Math.floor(TILE / heads)
    const buffers = [...[q, keys, weights, ...(limits ? [limits] : [])].map(bufferOf), scores]
    eachMatrices(batch, (first, texts) => {
      const words = [time, heads, features, count, queries, first]
      const teams = [tilesOf(count), Math.ceil(time / queries), texts] as const
      gpu.launch(program(limits !== undefined, areWide(features)), buffers, words, teams)
    })
    return [scores]
  }
