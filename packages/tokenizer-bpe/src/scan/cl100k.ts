/** @file The pre-tokenizer of cl100k_base, and of the many families that took it over (Llama 3: as it is; Qwen 2 and 3: single digits). */
import type { Parts } from '../parts.ts'
import { classOf } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'
import { blankEnd, contractionWidth, type Scanner } from './scanner.ts'

const pattern = (number: string, tail = '') =>
  `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${number}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|${tail}\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`

const CL100K = pattern('\\p{N}{1,3}')
/** In the newest tiktoken, spelled for Oniguruma: white space at the end of the text is one piece. */
const CL100K_TIKTOKEN = pattern('\\p{N}{1,3}', '\\s+\\z|')
const QWEN2 = pattern('\\p{N}')

const WORD = 0
const DIGIT = 1
const BLANK = 2
const BREAK = 3
const REST = 4

/** Kind of each class of the Unicode table. */
const KIND = Uint8Array.of(REST, WORD, WORD, WORD, WORD, WORD, REST, DIGIT, REST, REST, BLANK, BREAK)

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
function cl100kScanner(maxDigits: number, wholeTail: boolean): Scanner {
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

export const parts: Partial<Parts> = {
  cl100k: { scanner: cl100kScanner(3, false), patterns: [CL100K] },
  'cl100k-tiktoken': { scanner: cl100kScanner(3, true), patterns: [CL100K_TIKTOKEN] },
  qwen2: { scanner: cl100kScanner(1, false), patterns: [QWEN2] },
}
