/** @file The type of hand-written pre-tokenizers, and functions that several of them share. */
import { isSpace } from '../unicode/classes.ts'
import { codePointAt, previous, widthOf } from '../unicode/utf8.ts'

/**
 * Splits `bytes[pos..end)` into contiguous pieces. Writes the end of each piece to `ends` until `ends` is full or the
 * text ends, and returns the number of pieces. A call with the last end as `pos` continues. The bytes are well-formed
 * UTF-8, and `end` is the end of the text or the start of an added token.
 */
export type Scanner = (bytes: Uint8Array, pos: number, end: number, ends: Int32Array) => number

/** Returns the end of the run of White_Space that starts at `at`. */
export function whitespaceRunEnd(bytes: Uint8Array, at: number, end: number): number {
  while (at < end && isSpace(codePointAt(bytes, at))) at += widthOf(bytes[at])
  return at
}

/**
 * Returns the end of a match of `\s*[\r\n]+|\s+(?!\S)|\s+` at `pos`.
 * @param wholeTail puts `\s++$` before these alternatives
 */
export function whitespacePieceEnd(bytes: Uint8Array, pos: number, end: number, wholeTail: boolean): number {
  const at = whitespaceRunEnd(bytes, pos, end)
  if (at === end && wholeTail) return end
  for (let back = at; back > pos; back--) if (bytes[back - 1] === 10 || bytes[back - 1] === 13) return back
  if (at === end) return end
  const last = previous(bytes, at)
  return last > pos ? last : at
}

/**
 * Returns the length of a match of `(?i:'s|'t|'re|'ve|'m|'ll|'d)` at `pos`, or 0. Case folding maps U+017F (long s) to
 * s.
 */
export function contractionWidth(bytes: Uint8Array, pos: number, end: number): number {
  if (pos + 1 >= end || bytes[pos] !== 0x27) return 0
  const a = bytes[pos + 1] | 0x20
  if (a === 0x73 || a === 0x74 || a === 0x6d || a === 0x64) return 2
  if (pos + 2 >= end) return 0
  if (bytes[pos + 1] === 0xc5 && bytes[pos + 2] === 0xbf) return 3
  const b = bytes[pos + 2] | 0x20
  return ((a === 0x72 || a === 0x76) && b === 0x65) || (a === 0x6c && b === 0x6c) ? 3 : 0
}
