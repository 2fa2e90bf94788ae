/**
 * @file The pre-tokenizer of DeepSeek-LLM and DeepSeek-V2: newlines, words of the cased scripts, punctuation, trailing white space, CJK runs and
 * single digits, each split off inside what the ones before left over.
 */
import { classOf, NEWLINE, NUMBER, SPACE } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'

const LETTERS =
  'A-Za-z\u00b5À-ÖØ-öø-ƺƼ-ƿ\u01c4-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-\u03f5Ϸ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149ⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃'
const MARKS = '!-/:-~！-／：-～‘-‟\u3000-。'
const CJK_RUN = '一-龥\u0800-一가-퟿'

export const DEEPSEEK_LLM_PATTERNS = ['[\r\n]', `\\s?[${LETTERS}]+`, `\\s?[${MARKS}]+`, '\\s+$', `[${CJK_RUN}]+`]

const WORD = 1
const MARK = 2
const BLANK = 4
const CJK = 8
const DIGIT = 16
const BREAK = 32

function build(): Uint8Array {
  const table = new Uint8Array(classOf.length)
  for (let code = 0; code < table.length; code++) {
    const kind = classOf[code]
    table[code] = kind === NUMBER ? DIGIT : kind === SPACE ? BLANK : kind === NEWLINE ? BREAK : 0
  }
  const mark = (ranges: string, flag: number) => {
    for (const [, first, last] of ranges.matchAll(/(.)(?:-(.))?/gu)) {
      const stop = (last ?? first).codePointAt(0)!
      for (let code = first.codePointAt(0)!; code <= stop; code++) table[code] |= flag
    }
  }
  mark(CJK_RUN, CJK)
  mark(MARKS, MARK)
  mark(LETTERS, WORD)
  // Whoever comes first in the list of splits takes the character.
  for (let code = 0; code < table.length; code++) if (table[code] & WORD) table[code] = WORD
  return table
}

let flags: Uint8Array | undefined

export function scanDeepseekLlm(bytes: Uint8Array, pos: number, end: number, ends: Int32Array): number {
  flags ??= build()
  const table = flags
  const capacity = ends.length
  let count = 0
  while (pos < end && count < capacity) {
    const flag = table[codePointAt(bytes, pos)]
    let at = pos + widthOf(bytes[pos])
    const next = flagAt(table, bytes, at, end)
    if (flag & WORD || (flag & BLANK && next & WORD)) {
      while (at < end && table[codePointAt(bytes, at)] & WORD) at += widthOf(bytes[at])
    } else if (flag & MARK || (flag & BLANK && next & MARK && !opensWord(table, bytes, at, end))) {
      while (at < end && table[codePointAt(bytes, at)] & MARK && !opensWord(table, bytes, at, end))
        at += widthOf(bytes[at])
    } else if (!(flag & (BREAK | DIGIT))) {
      at = restEnd(table, bytes, at, end, flag)
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

/** Whether the white space at `at` belongs to the word after it. */
function opensWord(table: Uint8Array, bytes: Uint8Array, at: number, end: number): boolean {
  return (
    (flagAt(table, bytes, at, end) & BLANK) !== 0 && (flagAt(table, bytes, at + widthOf(bytes[at]), end) & WORD) !== 0
  )
}

/** Whether a word, punctuation, a newline or the end of the text starts at `at`. */
function restEnds(table: Uint8Array, bytes: Uint8Array, at: number, end: number): boolean {
  const flag = flagAt(table, bytes, at, end)
  if (flag & (WORD | MARK | BREAK)) return true
  if (!(flag & BLANK)) return false
  const after = at + widthOf(bytes[at])
  const next = flagAt(table, bytes, after, end)
  return (next & WORD) !== 0 || ((next & MARK) !== 0 && !opensWord(table, bytes, after, end))
}

/** End of the piece of what is left over that began with a character of flags `flag` and goes on at `at`. */
function restEnd(table: Uint8Array, bytes: Uint8Array, at: number, end: number, flag: number): number {
  const cjk = flag & CJK
  let blank = flag & BLANK
  while (!restEnds(table, bytes, at, end)) {
    const next = table[codePointAt(bytes, at)]
    if (next & DIGIT || (next & CJK) !== cjk) break
    // White space that reaches the end of what is left over is split off. Looked at once a run.
    if (next & BLANK && !blank) {
      let run = at
      while (!restEnds(table, bytes, run, end) && table[codePointAt(bytes, run)] & BLANK) run += widthOf(bytes[run])
      if (restEnds(table, bytes, run, end)) break
    }
    blank = next & BLANK
    at += widthOf(bytes[at])
  }
  return at
}
