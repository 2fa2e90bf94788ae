/**
 * @file The pre-tokenizer of o200k_base (GPT-4o and later): like cl100k, but also splits words before capitals after
 * lower case.
 */
import type { KnownPreTokenizer, PreTokenizerName } from '../pre-tokenizers.ts'
import { classOf } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'
import { contractionWidth, whitespacePieceEnd } from './scanner.ts'

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

const UPPER = 0 // Lu, Lt
const LOWER = 1 // Ll
const CASELESS = 2 // Lm, Lo, which match as upper and as lower case
const MARK = 3 // M, which match as both, and as the character before a word
const NUMBER = 4
const SPACE = 5
const NEWLINE = 6
const OTHER = 7

/** Kind of each class of the Unicode table. */
const KIND = Uint8Array.of(OTHER, UPPER, UPPER, LOWER, CASELESS, CASELESS, MARK, NUMBER, OTHER, OTHER, SPACE, NEWLINE)

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
    if (kind < MARK) {
      word = wordEnd(bytes, pos, end)
    } else if (kind !== NUMBER && kind !== NEWLINE) {
      // The character before a word. A mark before upper case only is a word by itself, by the first alternative.
      word = at < end && kindAt(bytes, at) <= MARK ? wordEnd(bytes, at, end) : -1
      if (kind === MARK && (word < 0 || allUpper)) word = allUpper && word >= 0 ? at : wordEnd(bytes, pos, end)
    }
    if (word >= 0) {
      at = word + (word < end ? contractionWidth(bytes, word, end) : 0)
    } else if (kind === NUMBER) {
      for (let digits = 1; digits < 3 && at < end && kindAt(bytes, at) === NUMBER; digits++) at += widthOf(bytes[at])
    } else if (kind === OTHER || (lead === 0x20 && at < end && isOther(kindAt(bytes, at)))) {
      while (at < end && isOther(kindAt(bytes, at))) at += widthOf(bytes[at])
      while (at < end && (bytes[at] === 10 || bytes[at] === 13 || bytes[at] === 0x2f)) at++
    } else {
      at = whitespacePieceEnd(bytes, pos, end, false)
    }
    ends[count++] = at
    pos = at
  }
  return count
}

/** Whether a kind matches `[^\s\p{L}\p{N}]`, which includes marks. */
function isOther(kind: number): boolean {
  return kind === OTHER || kind === MARK
}

/** Whether the last call of wordEnd matched by the second alternative: upper case only. */
let allUpper = false

/**
 * Returns the end of a match of `[upper|caseless]*[lower|caseless]+`, otherwise of
 * `[upper|caseless]+[lower|caseless]*`, at `pos`, which is a letter or mark. (Marks are caseless.) If no lower case
 * follows, the first alternative still matches up to the last caseless character.
 */
function wordEnd(bytes: Uint8Array, pos: number, end: number): number {
  let at = pos
  let caselessEnd = -1
  allUpper = false
  while (at < end) {
    const kind = kindAt(bytes, at)
    if (kind > MARK) break
    if (kind === LOWER) {
      while (at < end) {
        const inner = kindAt(bytes, at)
        if (inner > MARK || inner === UPPER) break
        at += widthOf(bytes[at])
      }
      return at
    }
    at += widthOf(bytes[at])
    if (kind !== UPPER) caselessEnd = at
  }
  if (caselessEnd >= 0) return caselessEnd
  allUpper = true
  return at
}

export const features = { o200k: { scanner: scanO200k, patterns: [PATTERN] } } satisfies Partial<
  Record<PreTokenizerName, KnownPreTokenizer>
>
