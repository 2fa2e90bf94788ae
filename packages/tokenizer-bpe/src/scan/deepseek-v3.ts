/**
 * @file The pre-tokenizer of DeepSeek-V3 (also R1 and V3.1): three nested splits, in one pass.
 *
 *   \p{N}{1,3}   |   [一-龥぀-ゟ゠-ヿ]+   |   words, punctuation, newlines and spaces in what is left
 *
 * The third split is applied to each number, each CJK run and the text between them separately: spaces before a number
 * or a CJK character form one piece, as at the end of a text, and a CJK run is split at its punctuation (゠ ・ ゛).
 * Adjacent characters that no alternative matches (controls, unassigned) form a piece.
 */
import type { KnownPreTokenizer, PreTokenizerName } from '../pre-tokenizers.ts'
import { kindTable } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'

const PATTERNS = [
  '\\p{N}{1,3}',
  '[一-龥\u3040-ゟ゠-ヿ]+',
  '[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+',
]

// Kinds of characters.
const OTHER = 0 // only matches as the character before a word
const WORD = 1 // L, M
const NUMBER = 2 // N
const CJK_WORD = 3 // L, M in a CJK run
const PUNCTUATION = 4 // P, S
const SPACE = 5 // White_Space except newlines
const NEWLINE = 6 // \r \n
const CJK_PUNCTUATION = 7 // P, S in a CJK run
const CJK_OTHER = 8 // unassigned, in a CJK run

/** Kind of each class of the Unicode table. */
const KIND = [OTHER, WORD, WORD, WORD, WORD, WORD, WORD, NUMBER, PUNCTUATION, PUNCTUATION, SPACE, NEWLINE]

function build(): Uint8Array {
  const table = kindTable(KIND)
  const cjk = (first: number, last: number) => {
    for (let code = first; code <= last; code++) {
      table[code] = table[code] === WORD ? CJK_WORD : table[code] === PUNCTUATION ? CJK_PUNCTUATION : CJK_OTHER
    }
  }
  cjk(0x4e00, 0x9fa5)
  cjk(0x3040, 0x30ff)
  return table
}

let kinds: Uint8Array | undefined

function scanDeepseekV3(bytes: Uint8Array, pos: number, end: number, ends: Int32Array): number {
  kinds ??= build()
  const table = kinds
  const capacity = ends.length
  let count = 0
  while (pos < end && count < capacity) {
    const lead = bytes[pos]
    let at = pos + widthOf(lead)
    const kind = table[lead < 0x80 ? lead : codePointAt(bytes, pos)]
    let next = OTHER
    let nextLead = 0
    if (at < end) {
      nextLead = bytes[at]
      next = table[nextLead < 0x80 ? nextLead : codePointAt(bytes, at)]
    } else next = -1

    if (kind === WORD || (next === WORD && (kind === SPACE || kind === OTHER))) {
      at = runEnd(table, bytes, at, end, WORD)
    } else if (kind === PUNCTUATION && lead < 0x80 && isAsciiLetter(nextLead) && at < end) {
      at++
      while (at < end && isAsciiLetter(bytes[at])) at++
    } else if (kind === PUNCTUATION || (lead === 0x20 && next === PUNCTUATION)) {
      at = runEnd(table, bytes, at, end, PUNCTUATION)
      at = runEnd(table, bytes, at, end, NEWLINE)
    } else if (kind === NUMBER) {
      for (let digits = 1; digits < 3 && at < end; digits++) {
        if (table[codePointAt(bytes, at)] !== NUMBER) break
        at += widthOf(bytes[at])
      }
    } else if (kind === CJK_WORD || (kind === CJK_OTHER && next === CJK_WORD)) {
      at = runEnd(table, bytes, at, end, CJK_WORD)
    } else if (kind === CJK_PUNCTUATION) {
      at = runEnd(table, bytes, at, end, CJK_PUNCTUATION)
    } else if (kind === SPACE || kind === NEWLINE) {
      at = whitespacePieceEnd(table, bytes, pos, end)
    } else {
      // Unmatched characters end before the first match: any other kind, or the last of them if a word follows.
      const word = kind === OTHER ? WORD : CJK_WORD
      while (at < end && next === kind) {
        const after = at + widthOf(nextLead)
        let following = -1
        let followingLead = 0
        if (after < end) {
          followingLead = bytes[after]
          following = table[followingLead < 0x80 ? followingLead : codePointAt(bytes, after)]
        }
        if (following === word) break
        at = after
        next = following
        nextLead = followingLead
      }
    }
    ends[count++] = at
    pos = at
  }
  return count
}

function isAsciiLetter(byte: number): boolean {
  const lower = byte | 0x20
  return lower >= 0x61 && lower <= 0x7a
}

function runEnd(table: Uint8Array, bytes: Uint8Array, at: number, end: number, kind: number): number {
  while (at < end) {
    const lead = bytes[at]
    if (lead < 0x80) {
      if (table[lead] !== kind) return at
      at++
    } else {
      if (table[codePointAt(bytes, at)] !== kind) return at
      at += widthOf(lead)
    }
  }
  return at
}

/**
 * Returns the end of a match of `\s*[\r\n]+|\s+(?!\S)|\s+` at `pos`. A number or CJK character counts as the end of the
 * text.
 */
function whitespacePieceEnd(table: Uint8Array, bytes: Uint8Array, pos: number, end: number): number {
  let at = pos
  let last = pos
  let newlineEnd = -1
  let kind = -1
  while (at < end) {
    const lead = bytes[at]
    kind = table[lead < 0x80 ? lead : codePointAt(bytes, at)]
    if (kind !== SPACE && kind !== NEWLINE) break
    last = at
    at += widthOf(lead)
    if (kind === NEWLINE) newlineEnd = at
    kind = -1
  }
  if (newlineEnd >= 0) return newlineEnd
  const textEnds = kind === -1 || kind === NUMBER || kind === CJK_WORD || kind >= CJK_PUNCTUATION
  return textEnds || last === pos ? at : last
}

export const features = { 'deepseek-v3': { scanner: scanDeepseekV3, patterns: PATTERNS } } satisfies Partial<
  Record<PreTokenizerName, KnownPreTokenizer>
>
