/** @file The pre-tokenizer of cl100k_base, and of the many families that took it over (Llama 3: as it is; Qwen 2 and 3: single digits). */
import { classOf, LETTER, NEWLINE, NUMBER, SPACE } from '../unicode/classes.ts'
import { codePointAt, previous, widthOf } from '../unicode/utf8.ts'
import { type Scanner, spaceEnd } from './scanner.ts'

const pattern = (number: string, tail = '') =>
  `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${number}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|${tail}\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`

export const CL100K_PATTERN = pattern('\\p{N}{1,3}')
/** In the newest tiktoken, spelled for Oniguruma: white space at the end of the text is one piece. */
export const CL100K_TIKTOKEN_PATTERN = pattern('\\p{N}{1,3}', '\\s+\\z|')
export const QWEN2_PATTERN = pattern('\\p{N}')

const WORD = 0
const DIGIT = 1
const BLANK = 2
const BREAK = 3
const REST = 4

const KIND = Uint8Array.from({ length: 12 }, (_, kind) =>
  kind >= 1 && kind <= LETTER
    ? WORD
    : kind === NUMBER
      ? DIGIT
      : kind === SPACE
        ? BLANK
        : kind === NEWLINE
          ? BREAK
          : REST,
)

/** Class of every code point below U+0080, which most text is made of. */
const ASCII = Uint8Array.from({ length: 128 }, (_, code) => KIND[classOf[code]])

function kindAt(bytes: Uint8Array, at: number): number {
  const lead = bytes[at]
  return lead < 0x80 ? ASCII[lead] : KIND[classOf[codePointAt(bytes, at)]]
}

/**
 * @param maxDigits digits that one piece may hold
 * @param wholeTail tiktoken's pattern (`\s++$` before the newline alternative): white space that ends the text is one piece, newlines or not
 */
export function cl100kScanner(maxDigits: number, wholeTail: boolean): Scanner {
  return (bytes, pos, end, ends) => {
    const capacity = ends.length
    let count = 0
    while (pos < end && count < capacity) {
      const lead = bytes[pos]
      const kind = kindAt(bytes, pos)
      let at = pos + widthOf(lead)
      const contraction = lead === 0x27 ? contractionWidth(bytes, pos, end) : 0
      if (contraction > 0) {
        at = pos + contraction
      } else if (kind === WORD || ((kind === REST || kind === BLANK) && at < end && kindAt(bytes, at) === WORD)) {
        while (at < end && kindAt(bytes, at) === WORD) at += widthOf(bytes[at])
      } else if (kind === DIGIT) {
        for (let digits = 1; digits < maxDigits && at < end && kindAt(bytes, at) === DIGIT; digits++)
          at += widthOf(bytes[at])
      } else if (kind === REST || (lead === 0x20 && at < end && kindAt(bytes, at) === REST)) {
        while (at < end && kindAt(bytes, at) === REST) at += widthOf(bytes[at])
        while (at < end && (bytes[at] === 10 || bytes[at] === 13)) at++
      } else {
        at = blankEnd(bytes, pos, end, wholeTail)
      }
      ends[count++] = at
      pos = at
    }
    return count
  }
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
