/**
 * @file The pre-tokenizer of DeepSeek-LLM and DeepSeek-V2: newlines, words of the cased scripts, punctuation, trailing white space, CJK runs and
 * single digits, each split off inside the pieces that the ones before made.
 */
import type { Parts } from '../parts.ts'
import { kindTable, NEWLINE, NUMBER, SPACE } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'

const LETTERS =
  'A-Za-z\u00b5À-ÖØ-öø-ƺƼ-ƿ\u01c4-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-\u03f5Ϸ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149ⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃'
const MARKS = '!-/:-~！-／：-～‘-‟\u3000-。'
const CJK_RUN = '一-龥\u0800-一가-퟿'

const PATTERNS = ['[\r\n]', `\\s?[${LETTERS}]+`, `\\s?[${MARKS}]+`, '\\s+$', `[${CJK_RUN}]+`]

const WORD = 1
const MARK = 2
const BLANK = 4
const CJK = 8
const DIGIT = 16
const BREAK = 32

function build(): Uint8Array {
  const kind = new Uint8Array(12)
  kind[NUMBER] = DIGIT
  kind[SPACE] = BLANK
  kind[NEWLINE] = BREAK
  const table = kindTable(kind)
  const mark = (ranges: string, flag: number) => {
    for (const [, first, last] of ranges.matchAll(/(.)(?:-(.))?/gu)) {
      const stop = (last ?? first).codePointAt(0)!
      for (let code = first.codePointAt(0)!; code <= stop; code++) table[code] |= flag
    }
  }
  mark(CJK_RUN, CJK)
  mark(MARKS, MARK)
  mark(LETTERS, WORD)
  return table
}

let flags: Uint8Array | undefined

function scanDeepseekLlm(bytes: Uint8Array, pos: number, end: number, ends: Int32Array): number {
  flags ??= build()
  const table = flags
  const capacity = ends.length
  let count = 0
  while (pos < end && count < capacity) {
    let flag = table[codePointAt(bytes, pos)]
    let at = pos + widthOf(bytes[pos])
    while (at < end) {
      const next = table[codePointAt(bytes, at)]
      if ((flag | next) & DIGIT || (flag ^ next) & CJK || splitsBefore(table, bytes, at, end, flag)) break
      if (next & BLANK && !(flag & BLANK) && trails(table, bytes, at, end)) break
      flag = next
      at += widthOf(bytes[at])
    }
    ends[count++] = at
    pos = at
  }
  return count
}

/** Flags of the character at `at`; the end of the text reads as a newline. */
function flagAt(table: Uint8Array, bytes: Uint8Array, at: number, end: number): number {
  return at < end ? table[codePointAt(bytes, at)] : BREAK
}

/**
 * Whether one of the first three splits has a border at `at`, before which a character of flags `before` stands. Each split works on what the one before
 * it made, matches included: ASCII letters are also in the range that the third takes for punctuation, so `Grüße` falls apart.
 */
function splitsBefore(table: Uint8Array, bytes: Uint8Array, at: number, end: number, before: number): boolean {
  const flag = flagAt(table, bytes, at, end)
  if ((before | flag) & BREAK) return true
  const after = at + widthOf(bytes[at])
  const next = flagAt(table, bytes, after, end)
  // Words, with one white space before them.
  if (flag & BLANK && next & WORD) return true
  if (flag & WORD && !(before & (WORD | BLANK))) return true
  if (before & WORD && !(flag & WORD)) return true
  // Punctuation, with one white space before it.
  if (before & MARK) return !(flag & MARK)
  if (flag & MARK) return !(before & BLANK)
  if (!(flag & BLANK) || !(next & MARK)) return false
  // An ideographic space counts as punctuation, but not where it belongs to the word after it.
  return !(next & BLANK && flagAt(table, bytes, after + widthOf(bytes[after]), end) & WORD)
}

/** Whether the white space from `at` on reaches the end of what the first three splits leave together. Asked once for a run. */
function trails(table: Uint8Array, bytes: Uint8Array, at: number, end: number): boolean {
  let flag = BLANK
  while (flag & BLANK) {
    flag = table[codePointAt(bytes, at)]
    at += widthOf(bytes[at])
    if (splitsBefore(table, bytes, at, end, flag)) return true
    flag = flagAt(table, bytes, at, end)
  }
  return false
}

export const parts: Partial<Parts> = { 'deepseek-llm': { scanner: scanDeepseekLlm, patterns: PATTERNS, digits: true } }
