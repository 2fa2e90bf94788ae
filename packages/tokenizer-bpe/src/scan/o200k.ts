/** @file The pre-tokenizer of o200k_base (GPT-4o and later): like cl100k, but words break where case rises. */
import type { Parts } from '../parts.ts'
import { classOf } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'
import { blankEnd, contractionWidth } from './scanner.ts'

const CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

const PATTERN = [
  `[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+${CONTRACTION}`,
  `[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*${CONTRACTION}`,
  '\\p{N}{1,3}',
  ' ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*',
  '\\s*[\\r\\n]+',
  '\\s+(?!\\S)',
  '\\s+',
].join('|')

const CAPITAL = 0 // Lu, Lt
const SMALL = 1 // Ll
const BOTH = 2 // Lm, Lo, which count as either
const ACCENT = 3 // M, which count as either and may also stand before a word
const DIGIT = 4
const BLANK = 5
const BREAK = 6
const REST = 7

/** Kind of each class of the Unicode table. */
const KIND = Uint8Array.of(REST, CAPITAL, CAPITAL, SMALL, BOTH, BOTH, ACCENT, DIGIT, REST, REST, BLANK, BREAK)

const ASCII = Uint8Array.from({ length: 128 }, (_, code) => KIND[classOf[code]])

function kindAt(bytes: Uint8Array, at: number): number {
  const lead = bytes[at]
  return lead < 0x80 ? ASCII[lead] : KIND[classOf[codePointAt(bytes, at)]]
}

function scanO200k(bytes: Uint8Array, pos: number, end: number, ends: Int32Array): number {
  const capacity = ends.length
  let count = 0
  while (pos < end && count < capacity) {
    const lead = bytes[pos]
    const kind = kindAt(bytes, pos)
    let at = pos + widthOf(lead)
    let word = -1
    if (kind < ACCENT) {
      word = wordEnd(bytes, pos, end)
    } else if (kind !== DIGIT && kind !== BREAK) {
      // As the character before the word; alone, a mark is also a word of its own (its first alternative wins over capitals).
      word = at < end && kindAt(bytes, at) <= ACCENT ? wordEnd(bytes, at, end) : -1
      if (kind === ACCENT && (word < 0 || allCapitals)) word = allCapitals && word >= 0 ? at : wordEnd(bytes, pos, end)
    }
    if (word >= 0) {
      at = word + (word < end ? contractionWidth(bytes, word, end) : 0)
    } else if (kind === DIGIT) {
      for (let digits = 1; digits < 3 && at < end && kindAt(bytes, at) === DIGIT; digits++) at += widthOf(bytes[at])
    } else if (kind === REST || (lead === 0x20 && at < end && isRest(kindAt(bytes, at)))) {
      while (at < end && isRest(kindAt(bytes, at))) at += widthOf(bytes[at])
      while (at < end && (bytes[at] === 10 || bytes[at] === 13 || bytes[at] === 0x2f)) at++
    } else {
      at = blankEnd(bytes, pos, end, false)
    }
    ends[count++] = at
    pos = at
  }
  return count
}

/** `[^\s\p{L}\p{N}]`, which marks are in. */
function isRest(kind: number): boolean {
  return kind === REST || kind === ACCENT
}

/** Whether the last call of wordEnd matched by the second alternative: capitals only. */
let allCapitals = false

/**
 * End of `[capital|both]*[small|both]+`, else of `[capital|both]+[small|both]*`, at `pos`, which is a letter or mark. Where no small letter
 * follows the run of capitals, the first alternative still matches up to the last character that counts as either.
 */
function wordEnd(bytes: Uint8Array, pos: number, end: number): number {
  let at = pos
  let bothEnd = -1
  allCapitals = false
  while (at < end) {
    const kind = kindAt(bytes, at)
    if (kind > ACCENT) break
    if (kind === SMALL) {
      while (at < end) {
        const inner = kindAt(bytes, at)
        if (inner > ACCENT || inner === CAPITAL) break
        at += widthOf(bytes[at])
      }
      return at
    }
    at += widthOf(bytes[at])
    if (kind !== CAPITAL) bothEnd = at
  }
  if (bothEnd >= 0) return bothEnd
  allCapitals = true
  return at
}

export const parts: Partial<Parts> = { o200k: { scanner: scanO200k, patterns: [PATTERN] } }
