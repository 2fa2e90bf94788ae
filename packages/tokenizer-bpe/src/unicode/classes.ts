/**
 * @file Classes of code points, fixed at Unicode 16.0, so that a text has the same tokens in every runtime. Hugging
 * Face tokenizers 0.23 (Oniguruma 6.9.10) and tiktoken 0.14 (regex-syntax 0.8) use the same version.
 */

// 0 is everything else: controls, private use and unassigned code points.
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

/** The letters that represent the classes in tables of runs, by class. */
export const CLASS_LETTERS = 'outlmxknps'

export const CODE_POINTS = 0x110000

/** Class of every code point. Beyond ASCII they are 0 until engine-classes.ts or pinned-classes.ts fills them. */
export const classOf: Uint8Array = new Uint8Array(CODE_POINTS)

/** Whether a code point has the property White_Space. */
export function isSpace(code: number): boolean {
  return classOf[code] >= SPACE
}

/** Whether the classes beyond ASCII are filled. */
export function isFilled(): boolean {
  return classOf[0xaa] !== 0
}

/** Fills classes from runs: a letter and the length in base 36, which is omitted if it is 1. `aN` is N pairs `ul`. */
export function fillRuns(runs: string): void {
  let at = 0
  for (const [, letter, digits] of runs.matchAll(/([a-z])([0-9A-Z]*)/g)) {
    const length = Number.parseInt(digits || '1', 36)
    if (letter === 'a') {
      for (let i = 0; i < length; i++) {
        classOf[at++] = UPPER
        classOf[at++] = LOWER
      }
    } else {
      classOf.fill(CLASS_LETTERS.indexOf(letter), at, at + length)
      at += length
    }
  }
  fillSpaces()
}

/** Fills the classes of White_Space, which has not changed since Unicode 6.3. */
export function fillSpaces(): void {
  for (const space of '\t\v\f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000') classOf[space.charCodeAt(0)] = SPACE
  classOf.fill(SPACE, 0x2000, 0x200b)
  classOf[10] = classOf[13] = NEWLINE
}

/**
 * Returns a table of the kinds of characters that a scanner distinguishes, by code point, from a kind for each class.
 * Call it when the scanner is first used, after the classes are filled.
 */
export function kindTable(kindOf: ArrayLike<number>): Uint8Array {
  const table = new Uint8Array(classOf.length)
  for (let code = 0; code < table.length; code++) table[code] = kindOf[classOf[code]]
  return table
}

// Scanners build ASCII tables when their modules load.
fillRuns('oXp3sp6sp4nAp2s3p2uQp3spslQpspso')
