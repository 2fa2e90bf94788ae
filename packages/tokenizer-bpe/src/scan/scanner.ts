/** @file What a pre-tokenizer is here, and the loops that several of them share. */
import { classOf, NEWLINE, SPACE } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'

/**
 * Cuts `bytes[pos..end)` (well-formed UTF-8, the whole text between two added tokens from `pos` on) into pieces that touch: writes the end
 * of each piece into `ends` until it is full or the text is, and returns how many. Calling again from the last end continues.
 */
export type Scanner = (bytes: Uint8Array, pos: number, end: number, ends: Int32Array) => number

/** End of the run of White_Space that starts at `at`. */
export function spaceEnd(bytes: Uint8Array, at: number, end: number): number {
  while (at < end) {
    const kind = classOf[codePointAt(bytes, at)]
    if (kind !== SPACE && kind !== NEWLINE) break
    at += widthOf(bytes[at])
  }
  return at
}
