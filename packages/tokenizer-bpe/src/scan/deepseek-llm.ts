/**
 * @file The pre-tokenizer of DeepSeek-LLM and DeepSeek-V2: splits at newlines, words of scripts with case, punctuation,
 * trailing white space, CJK runs and single digits, each within the pieces of the previous splits.
 */
import type { KnownPreTokenizer, PreTokenizerName } from '../pre-tokenizers.ts'
import {
  kindTable,
  NEWLINE as NEWLINE_CLASS,
  NUMBER as NUMBER_CLASS,
  SPACE as SPACE_CLASS,
} from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'

const LETTERS =
  'A-Za-z\u00b5À-ÖØ-öø-ƺƼ-ƿ\u01c4-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-\u03f5Ϸ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149ⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃'
const PUNCTUATION_MARKS = '!-/:-~！-／：-～‘-‟\u3000-。'
const CJK_RUN = '一-龥\u0800-一가-퟿'

const PATTERNS = ['[\r\n]', `\\s?[${LETTERS}]+`, `\\s?[${PUNCTUATION_MARKS}]+`, '\\s+$', `[${CJK_RUN}]+`]

// Flags of a character.
const WORD = 1
const PUNCTUATION = 2
const SPACE = 4
const CJK = 8
const NUMBER = 16
const NEWLINE = 32

function build(): Uint8Array {
  const kind = new Uint8Array(12)
  kind[NUMBER_CLASS] = NUMBER
  kind[SPACE_CLASS] = SPACE
  kind[NEWLINE_CLASS] = NEWLINE
  const table = kindTable(kind)
  const add = (ranges: string, flag: number) => {
    for (const [, first, last] of ranges.matchAll(/(.)(?:-(.))?/gu)) {
      const stop = (last ?? first).codePointAt(0)!
      for (let code = first.codePointAt(0)!; code <= stop; code++) table[code] |= flag
    }
  }
  add(CJK_RUN, CJK)
  add(PUNCTUATION_MARKS, PUNCTUATION)
  add(LETTERS, WORD)
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
      if ((flag | next) & NUMBER || (flag ^ next) & CJK || splitsBefore(table, bytes, at, end, flag)) break
      if (next & SPACE && !(flag & SPACE) && trails(table, bytes, at, end)) break
      flag = next
      at += widthOf(bytes[at])
    }
    ends[count++] = at
    pos = at
  }
  return count
}

/** Returns the flags of the character at `at`; at the end of the text, those of a newline. */
function flagAt(table: Uint8Array, bytes: Uint8Array, at: number, end: number): number {
  return at < end ? table[codePointAt(bytes, at)] : NEWLINE
}

/**
 * Whether one of the first three splits has a boundary at `at`, after a character with the flags `before`. Each split
 * also applies to the matches of the previous one: since ASCII letters are in the range that the third takes for
 * punctuation, `Grüße` is split.
 */
function splitsBefore(table: Uint8Array, bytes: Uint8Array, at: number, end: number, before: number): boolean {
  const flag = flagAt(table, bytes, at, end)
  if ((before | flag) & NEWLINE) return true
  const after = at + widthOf(bytes[at])
  const next = flagAt(table, bytes, after, end)
  // Words, with one white space before them.
  if (flag & SPACE && next & WORD) return true
  if (flag & WORD && !(before & (WORD | SPACE))) return true
  if (before & WORD && !(flag & WORD)) return true
  // Punctuation, with one white space before it.
  if (before & PUNCTUATION) return !(flag & PUNCTUATION)
  if (flag & PUNCTUATION) return !(before & SPACE)
  if (!(flag & SPACE) || !(next & PUNCTUATION)) return false
  // An ideographic space counts as punctuation, unless it belongs to the word after it.
  return !(next & SPACE && flagAt(table, bytes, after + widthOf(bytes[after]), end) & WORD)
}

/**
 * Whether the white space at `at` extends to the end of its piece after the first three splits. Called once per run.
 */
function trails(table: Uint8Array, bytes: Uint8Array, at: number, end: number): boolean {
  let flag = SPACE
  while (flag & SPACE) {
    flag = table[codePointAt(bytes, at)]
    at += widthOf(bytes[at])
    if (splitsBefore(table, bytes, at, end, flag)) return true
    flag = flagAt(table, bytes, at, end)
  }
  return false
}

export const features = {
  'deepseek-llm': { scanner: scanDeepseekLlm, patterns: PATTERNS, digits: true },
} satisfies Partial<Record<PreTokenizerName, KnownPreTokenizer>>
