/** @file The pre-tokenizers of cl100k_base, Llama 3 (the same) and Qwen 2 and 3 (with single digits). */
import type { KnownPreTokenizer, PreTokenizerName } from '../pre-tokenizers.ts'
import { classOf } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'
import { contractionWidth, type Scanner, whitespacePieceEnd } from './scanner.ts'

const pattern = (number: string, tail = '') =>
  `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${number}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|${tail}\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`

const CL100K = pattern('\\p{N}{1,3}')
/** The pattern of newer tiktoken versions in Oniguruma syntax: white space at the end of the text is one piece. */
const CL100K_TIKTOKEN = pattern('\\p{N}{1,3}', '\\s+\\z|')
const QWEN2 = pattern('\\p{N}')

const LETTER = 0
const NUMBER = 1
const SPACE = 2
const NEWLINE = 3
const OTHER = 4

/** Kind of each class of the Unicode table. */
const KIND = Uint8Array.of(OTHER, LETTER, LETTER, LETTER, LETTER, LETTER, OTHER, NUMBER, OTHER, OTHER, SPACE, NEWLINE)

/** Kind of each ASCII character, for speed. */
const ASCII = Uint8Array.from({ length: 128 }, (_, code) => KIND[classOf[code]])

function kindAt(bytes: Uint8Array, at: number): number {
  const lead = bytes[at]
  return lead < 0x80 ? ASCII[lead] : KIND[classOf[codePointAt(bytes, at)]]
}

/**
 * @param maxDigits maximum number of digits in a piece
 * @param wholeTail whether white space at the end of the text is one piece, as in tiktoken (`\s++$`)
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
      } else if (kind === LETTER || ((kind === OTHER || kind === SPACE) && at < end && kindAt(bytes, at) === LETTER)) {
        while (at < end && kindAt(bytes, at) === LETTER) at += widthOf(bytes[at])
      } else if (kind === NUMBER) {
        for (let digits = 1; digits < maxDigits && at < end && kindAt(bytes, at) === NUMBER; digits++)
          at += widthOf(bytes[at])
      } else if (kind === OTHER || (lead === 0x20 && at < end && kindAt(bytes, at) === OTHER)) {
        while (at < end && kindAt(bytes, at) === OTHER) at += widthOf(bytes[at])
        while (at < end && (bytes[at] === 10 || bytes[at] === 13)) at++
      } else {
        at = whitespacePieceEnd(bytes, pos, end, wholeTail)
      }
      ends[count++] = at
      pos = at
    }
    return count
  }
}

export const features = {
  cl100k: { scanner: cl100kScanner(3, false), patterns: [CL100K] },
  'cl100k-tiktoken': { scanner: cl100kScanner(3, true), patterns: [CL100K_TIKTOKEN] },
  qwen2: { scanner: cl100kScanner(1, false), patterns: [QWEN2] },
} satisfies Partial<Record<PreTokenizerName, KnownPreTokenizer>>
