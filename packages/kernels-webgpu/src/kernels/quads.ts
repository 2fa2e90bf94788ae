/**
 * @file Four adjacent elements at once: how tiled kernels read a matrix. If the length of rows is a multiple of four (`wide`), that is one load of 16 bytes, for which WGSL needs a
 * different declaration of the buffer; otherwise four loads with bounds checks.
 */

/** The matrices of an op are either all wide or not, so that there are two variants of its kernel. */
export const areWide = (...lengths: readonly number[]): boolean => lengths.every(length => length % 4 === 0)

/** Declaration of a buffer that `readQuad` reads. */
export const quads = (name: string, wide: boolean, dtype: 'f32' | 'bf16' = 'f32'): string => {
  if (dtype === 'bf16') return `${name} ${wide ? 'vec2<u32>' : 'u32'}`
  return `${name} ${wide ? 'vec4<f32>' : 'f32'}`
}

/** WGSL: the elements from `at` on, four or one. */
const elements = {
  f32: { four: (name: string) => `${name}[at >> 2u]`, one: (name: string) => `${name}[at]` },
  bf16: {
    four: (name: string) =>
      `bitcast<vec4<f32>>((${name}[at >> 2u].xxyy << vec4<u32>(16u, 0u, 16u, 0u)) & vec4<u32>(0xffff0000u))`,
    one: (name: string) => `bitcast<f32>((${name}[at >> 1u] >> (at % 2u * 16u)) << 16u)`,
  },
}

/** WGSL: `fn <name>4(start, i, size) -> vec4<f32>`, elements i to i + 3 of the row at `start`, with zeros from `size` on. i is a multiple of four. */
export const readQuad = (name: string, wide: boolean, dtype: 'f32' | 'bf16' = 'f32'): string =>
  wide
    ? `
fn ${name}4(start: u32, i: u32, size: u32) -> vec4<f32> {
  let at = start + i;
  if (i < size) { return ${elements[dtype].four(name)}; }
  return vec4<f32>();
}`
    : `
fn ${name}4(start: u32, i: u32, size: u32) -> vec4<f32> {
  var quad = vec4<f32>();
  for (var c = 0u; c < 4u; c++) {
    let at = start + i + c;
    if (i + c < size) { quad[c] = ${elements[dtype].one(name)}; }
  }
  return quad;
}`

/** Repeats WGSL for each of `count` indices, with constant names, so that compilers keep the values in registers. */
export const repeat = (count: number, text: (i: number) => string): string =>
  Array.from({ length: count }, (_, i) => text(i)).join('')
