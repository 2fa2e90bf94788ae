/**
 * @file The pre-tokenizer of DeepSeek-V3 (also R1 and V3.1): three splits, one inside the other, in one pass.
 *
 *   \p{N}{1,3}   |   [一-龥぀-ゟ゠-ヿ]+   |   words, punctuation, newlines and spaces of what is between
 *
 * Numbers, CJK runs and what lies between them are each matched by the third as a text of their own: a run of spaces before a number or a CJK
 * character stays whole, as at the end of a text, and a CJK run falls apart at its punctuation (゠ ・ ゛). Characters that no alternative
 * takes (controls, unassigned) join into pieces.
 */
import type { Parts } from '../parts.ts'
import { kindTable } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'

const PATTERNS = [
  '\\p{N}{1,3}',
  '[一-龥\u3040-ゟ゠-ヿ]+',
  '[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+',
]

// Classes of this scanner.
const GAP = 0 // in no alternative but as the one character before a word
const WORD = 1 // L, M
const DIGIT = 2 // N
const CJK_WORD = 3 // L, M of a CJK run
const MARKS = 4 // P, S
const BLANK = 5 // White_Space but for newlines
const BREAK = 6 // \r \n
const CJK_MARKS = 7 // P, S of a CJK run
const CJK_GAP = 8 // unassigned, in a CJK run

/** Kind of each class of the Unicode table. */
const KIND = [GAP, WORD, WORD, WORD, WORD, WORD, WORD, DIGIT, MARKS, MARKS, BLANK, BREAK]

function build(): Uint8Array {
  const table = kindTable(KIND)
  const cjk = (first: number, last: number) => {
    for (let code = first; code <= last; code++) {
      table[code] = table[code] === WORD ? CJK_WORD : table[code] === MARKS ? CJK_MARKS : CJK_GAP
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
    let next = GAP
    let nextLead = 0
    if (at < end) {
      nextLead = bytes[at]
      next = table[nextLead < 0x80 ? nextLead : codePointAt(bytes, at)]
    } else next = -1

    if (kind === WORD || (next === WORD && (kind === BLANK || kind === GAP))) {
      at = runEnd(table, bytes, at, end, WORD)
    } else if (kind === MARKS && lead < 0x80 && isAsciiLetter(nextLead) && at < end) {
      at++
      while (at < end && isAsciiLetter(bytes[at])) at++
    } else if (kind === MARKS || (lead === 0x20 && next === MARKS)) {
      at = runEnd(table, bytes, at, end, MARKS)
      at = runEnd(table, bytes, at, end, BREAK)
    } else if (kind === DIGIT) {
      for (let digits = 1; digits < 3 && at < end; digits++) {
        if (table[codePointAt(bytes, at)] !== DIGIT) break
        at += widthOf(bytes[at])
      }
    } else if (kind === CJK_WORD || (kind === CJK_GAP && next === CJK_WORD)) {
      at = runEnd(table, bytes, at, end, CJK_WORD)
    } else if (kind === CJK_MARKS) {
      at = runEnd(table, bytes, at, end, CJK_MARKS)
    } else if (kind === BLANK || kind === BREAK) {
      at = blankEnd(table, bytes, pos, end)
    } else {
      // A gap ends before the first character that starts a match: anything else, or the last gap character before a word.
      const word = kind === GAP ? WORD : CJK_WORD
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

/** `\s*[\r\n]+|\s+(?!\S)|\s+` from white space at `pos`; a number or CJK character ends the text here. */
function blankEnd(table: Uint8Array, bytes: Uint8Array, pos: number, end: number): number {
  let at = pos
  let last = pos
  let newlineEnd = -1
  let kind = -1
  while (at < end) {
    const lead = bytes[at]
    kind = table[lead < 0x80 ? lead : codePointAt(bytes, at)]
    if (kind !== BLANK && kind !== BREAK) break
    last = at
    at += widthOf(lead)
    if (kind === BREAK) newlineEnd = at
    kind = -1
  }
  if (newlineEnd >= 0) return newlineEnd
  const textEnds = kind === -1 || kind === DIGIT || kind === CJK_WORD || kind >= CJK_MARKS
  return textEnds || last === pos ? at : last
}

export const parts: Partial<Parts> = { 'deepseek-v3': { scanner: scanDeepseekV3, patterns: PATTERNS } }
