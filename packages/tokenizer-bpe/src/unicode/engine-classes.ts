/**
 * @file Derives the classes from the runtime's own regular expressions, corrected by the differences between Unicode
 * versions. A hash over the result verifies that it is exactly Unicode 16.0. This works in engines of Unicode 15.0 to
 * 17.0.
 */
import { CLASS_LETTERS, CODE_POINTS, classOf, fillSpaces } from './classes.ts'

/**
 * Runs of code points whose class differs between Unicode 16.0 and 15.0, 15.1 or 17.0: the class in 16.0, the distance
 * from the end of the previous run, and the length - 1 (both in base 36). Written by scripts/unicode-changes.ts.
 */
const CHANGES =
  'lIDo16Hk7oQSo3Jo2R6-Eo2-Bp2Q-1p1Bu7Dl0oTYsO5-2o1GSsV9-3sDG-1s9uNA3-1l0o0-1o2o1u5l0u0oKoGK1-FoCD-1o1I-6x1KH-1FoNG' +
  '-PnRQ-9x0-3m0x0u0-Lk3-4p0m0l0-Ls8-1x8I-2o0-2o8-8oX-1k0xW3-9x1x2x1-11x1k0-8k1k2k1-3k1-4x0k0x0p0-1p1-1k8-1nKT-JoVW' +
  '-7x2G-Wp0nE-9oC6-17o4-9kA8x45H-32Yx5QD-Tk0-Hn0-9m2DI-2x0-13m0-1p0-2n0-9o86-Oo2-Oo7Y-4o4QP-7xZJo9-Lo2P-36sC99-6Nn' +
  '0-9o0-2s3-C3o6-MoF-Gx4IN-Tk0-1x0n0-9p4o5C-Uo1-Lo8-1o34Oo4E-3s8N-9s4-1oE-8oAJ-3s1Do0o3s0s1As7o1o4sEs2s9o0o4s63-10' +
  'oAo10ZJ-5o4MA-Bx5S2-H9oAJ6-3BD'

const HASH = 1534221604

/** Returns a hash over all classes. */
export function hashOfClasses(): number {
  let hash = 1
  for (let code = 0; code < CODE_POINTS; code++) hash = Math.imul((hash ^ (hash >>> 15)) + classOf[code], 0x9e3779b1)
  return hash
}

/** Code points per call of String.fromCodePoint; engines limit the number of arguments. */
const BLOCK = 4096

/** Fills the classes. Returns false for an unknown version of Unicode; they must then be filled from the table. */
export function fillFromEngine(): boolean {
  // The index of the matching group is the class. The last alternative skips other code points faster.
  const runs = /(\p{Lu}+)|(\p{Lt}+)|(\p{Ll}+)|(\p{Lm}+)|(\p{Lo}+)|(\p{M}+)|(\p{N}+)|(\p{P}+)|(\p{S}+)|\p{C}+/gu
  for (let first = 0; first < CODE_POINTS; first += BLOCK) {
    // In all versions so far, planes 4 to 16 only contain a part of plane 14 and private use.
    if (first === 0x34000) first = 0xe0000
    if (first === 0xe1000) break
    const units = first < 0x10000 ? 1 : 2
    const text = String.fromCodePoint(...Array.from({ length: BLOCK }, (_, i) => first + i))
    for (const match of text.matchAll(runs)) {
      const at = first + match.index / units
      classOf.fill(Math.max(0, match.indexOf(match[0], 1)), at, at + match[0].length / units)
    }
  }
  let at = 0
  for (const [, letter, gap, more] of CHANGES.matchAll(/([a-z])([0-9A-Z]+)-?([0-9A-Z]*)/g)) {
    const start = at + Number.parseInt(gap, 36)
    at = start + 1 + Number.parseInt(more || '0', 36)
    classOf.fill(CLASS_LETTERS.indexOf(letter), start, at)
  }
  fillSpaces()
  if (hashOfClasses() === HASH) return true
  classOf.fill(0, 0x80)
  return false
}
