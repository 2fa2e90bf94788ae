/**
 * @file Four neighbours at once: how kernels with tiles read a matrix. Where rows are a multiple of four long (`wide`) they are one load of 16 bytes, which WGSL allows
 * where the buffer is declared so; else four loads, each looked at.
 */

/** The matrices of an op are wide or not together, so that there are two forms of its kernel. */
export const areWide = (...lengths: readonly number[]): boolean => lengths.every(length => length % 4 === 0)

/** Declaration of a buffer that is read by `readQuad`. */
export const quads = (name: string, wide: boolean): string => `${name} ${wide ? 'vec4<f32>' : 'f32'}`

/** WGSL: `fn <name>4(start, i, size) -> vec4<f32>`, the elements i to i + 3 of the row that begins at `start`, zeros from `size` on. i is a multiple of four. */
export const readQuad = (name: string, wide: boolean): string =>
  wide
    ? `
fn ${name}4(start: u32, i: u32, size: u32) -> vec4<f32> {
  if (i < size) { return ${name}[(start + i) >> 2u]; }
  return vec4<f32>();
}`
    : `
fn ${name}4(start: u32, i: u32, size: u32) -> vec4<f32> {
  var quad = vec4<f32>();
  for (var c = 0u; c < 4u; c++) {
    if (i + c < size) { quad[c] = ${name}[start + i + c]; }
  }
  return quad;
}`

/** WGSL text for each of `count` numbers: what a compiler should keep in registers is named by constants. */
export const repeat = (count: number, text: (i: number) => string): string =>
  Array.from({ length: count }, (_, i) => text(i)).join('')
