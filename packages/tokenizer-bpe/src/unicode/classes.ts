/**
 * @file Classes of code points, fixed at Unicode 16.0, so that the same text gives the same tokens in every runtime. It is the
 * version inside Hugging Face tokenizers 0.23 (Oniguruma 6.9.10) and tiktoken 0.14 (regex-syntax 0.8).
 */
import { CATEGORY_RUNS } from './category-runs.ts'

export const OTHER = 0
export const UPPER = 1
export const TITLE = 2
export const LOWER = 3
export const MODIFIER = 4
export const LETTER = 5
export const MARK = 6
export const NUMBER = 7
export const PUNCTUATION = 8
export const SYMBOL = 9
/** White_Space except carriage return and line feed. */
export const SPACE = 10
/** Carriage return and line feed. */
export const NEWLINE = 11

const CLASS_OF_LETTER: Record<string, number> = {
  o: OTHER,
  u: UPPER,
  t: TITLE,
  l: LOWER,
  m: MODIFIER,
  x: LETTER,
  k: MARK,
  n: NUMBER,
  p: PUNCTUATION,
  s: SYMBOL,
}

export const CODE_POINTS = 0x110000

/** First and last code points of the ranges that are White_Space. */
const SPACE_RANGES = [
  9, 13, 32, 32, 133, 133, 160, 160, 5760, 5760, 8192, 8202, 8232, 8233, 8239, 8239, 8287, 8287, 12288, 12288,
]

function build(): Uint8Array {
  const table = new Uint8Array(CODE_POINTS)
  let at = 0
  for (const [, letter, digits] of CATEGORY_RUNS.matchAll(/([a-z])([0-9A-Z]*)/g)) {
    const length = digits === '' ? 1 : Number.parseInt(digits, 36)
    if (letter === 'a') {
      for (let i = 0; i < length; i++) {
        table[at++] = UPPER
        table[at++] = LOWER
      }
    } else {
      table.fill(CLASS_OF_LETTER[letter], at, at + length)
      at += length
    }
  }
  for (let i = 0; i < SPACE_RANGES.length; i += 2) table.fill(SPACE, SPACE_RANGES[i], SPACE_RANGES[i + 1] + 1)
  table[10] = NEWLINE
  table[13] = NEWLINE
  return table
}

/** Class of every code point, one byte each. */
export const classOf: Uint8Array = /* @__PURE__ */ build()
