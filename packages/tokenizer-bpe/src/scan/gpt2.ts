/** @file The pre-tokenizer of GPT-2, which is also what ByteLevel with `use_regex` does. */
import type { Parts } from '../parts.ts'
import { classOf } from '../unicode/classes.ts'
import { codePointAt, previous, widthOf } from '../unicode/utf8.ts'
import { spaceEnd } from './scanner.ts'

export const GPT2_PATTERN = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

const WORD = 0
const DIGIT = 1
const BLANK = 2
const REST = 3

/** Kind of each class of the Unicode table. */
const KIND = Uint8Array.of(REST, WORD, WORD, WORD, WORD, WORD, REST, DIGIT, REST, REST, BLANK, BLANK)

export function scanGpt2(bytes: Uint8Array, pos: number, end: number, ends: Int32Array): number {
  const capacity = ends.length
  let count = 0
  while (pos < end && count < capacity) {
    const lead = bytes[pos]
    let at = pos + widthOf(lead)
    let kind = KIND[classOf[lead < 0x80 ? lead : codePointAt(bytes, pos)]]
    const contraction = lead === 0x27 ? contractionWidth(bytes, pos, end) : 0
    if (contraction > 0) {
      at = pos + contraction
    } else {
      if (lead === 0x20 && at < end) {
        const following = KIND[classOf[codePointAt(bytes, at)]]
        if (following !== BLANK) {
          kind = following
          at += widthOf(bytes[at])
        }
      }
      if (kind === BLANK) {
        at = spaceEnd(bytes, at, end)
        if (at < end) {
          const last = previous(bytes, at)
          if (last > pos) at = last
        }
      } else {
        while (at < end) {
          const c = bytes[at]
          if (KIND[classOf[c < 0x80 ? c : codePointAt(bytes, at)]] !== kind) break
          at += widthOf(c)
        }
      }
    }
    ends[count++] = at
    pos = at
  }
  return count
}

/** Bytes of `'s 't 'm 'd 're 've 'll` at `pos`, or 0. */
function contractionWidth(bytes: Uint8Array, pos: number, end: number): number {
  if (pos + 1 >= end) return 0
  const a = bytes[pos + 1]
  if (a === 0x73 || a === 0x74 || a === 0x6d || a === 0x64) return 2
  if (pos + 2 >= end) return 0
  const b = bytes[pos + 2]
  return ((a === 0x72 || a === 0x76) && b === 0x65) || (a === 0x6c && b === 0x6c) ? 3 : 0
}

export const parts: Partial<Parts> = { gpt2: { scanner: scanGpt2, patterns: [], spelled: GPT2_PATTERN } }
