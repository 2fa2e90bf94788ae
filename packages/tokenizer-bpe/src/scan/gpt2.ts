/** @file The pre-tokenizer of GPT-2, which is also that of ByteLevel with `use_regex`. */
import type { KnownPreTokenizer, PreTokenizerName } from '../pre-tokenizers.ts'
import { classOf } from '../unicode/classes.ts'
import { codePointAt, previous, widthOf } from '../unicode/utf8.ts'
import { whitespaceRunEnd } from './scanner.ts'

export const GPT2_PATTERN = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

const LETTER = 0
const NUMBER = 1
const SPACE = 2
const OTHER = 3

/** Kind of each class of the Unicode table. */
const KIND = Uint8Array.of(OTHER, LETTER, LETTER, LETTER, LETTER, LETTER, OTHER, NUMBER, OTHER, OTHER, SPACE, SPACE)

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
        if (following !== SPACE) {
          kind = following
          at += widthOf(bytes[at])
        }
      }
      if (kind === SPACE) {
        at = whitespaceRunEnd(bytes, at, end)
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

/** Returns the length of a match of `'s|'t|'re|'ve|'m|'ll|'d` at `pos`, or 0. */
function contractionWidth(bytes: Uint8Array, pos: number, end: number): number {
  if (pos + 1 >= end) return 0
  const a = bytes[pos + 1]
  if (a === 0x73 || a === 0x74 || a === 0x6d || a === 0x64) return 2
  if (pos + 2 >= end) return 0
  const b = bytes[pos + 2]
  return ((a === 0x72 || a === 0x76) && b === 0x65) || (a === 0x6c && b === 0x6c) ? 3 : 0
}

export const features = { gpt2: { scanner: scanGpt2, patterns: [], explicitPattern: GPT2_PATTERN } } satisfies Partial<
  Record<PreTokenizerName, KnownPreTokenizer>
>
