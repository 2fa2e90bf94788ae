/** @file What a pre-tokenizer is here, and the loops that several of them share. */
import { isSpace } from '../unicode/classes.ts'
import { codePointAt, previous, widthOf } from '../unicode/utf8.ts'

/**
 * Cuts `bytes[pos..end)` (well-formed UTF-8, the whole text between two added tokens from `pos` on) into pieces that touch: writes the end
 * of each piece into `ends` until it is full or the text is, and returns how many. Calling again from the last end continues.
 */
export type Scanner = (bytes: Uint8Array, pos: number, end: number, ends: Int32Array) => number

/** End of the run of White_Space that starts at `at`. */
export function spaceEnd(bytes: Uint8Array, at: number, end: number): number {
  while (at < end && isSpace(codePointAt(bytes, at))) at += widthOf(bytes[at])
  return at
}

/** `\s*[\r\n]+|\s+(?!\S)|\s+`, with `\s++$` before them when `wholeTail`. */
export function blankEnd(bytes: Uint8Array, pos: number, end: number, wholeTail: boolean): number {
  const at = spaceEnd(bytes, pos, end)
  if (at === end && wholeTail) return end
  for (let back = at; back > pos; back--) if (bytes[back - 1] === 10 || bytes[back - 1] === 13) return back
  if (at === end) return end
  const last = previous(bytes, at)
  return last > pos ? last : at
}

/** Bytes of `(?i:'s|'t|'re|'ve|'m|'ll|'d)` at `pos`, or 0. Under case folding U+017F (long s) is an s. */
export function contractionWidth(bytes: Uint8Array, pos: number, end: number): number {
  if (pos + 1 >= end || bytes[pos] !== 0x27) return 0
  const a = bytes[pos + 1] | 0x20
  if (a === 0x73 || a === 0x74 || a === 0x6d || a === 0x64) return 2
  if (pos + 2 >= end) return 0
  if (bytes[pos + 1] === 0xc5 && bytes[pos + 2] === 0xbf) return 3
  const b = bytes[pos + 2] | 0x20
  return ((a === 0x72 || a === 0x76) && b === 0x65) || (a === 0x6c && b === 0x6c) ? 3 : 0
}
