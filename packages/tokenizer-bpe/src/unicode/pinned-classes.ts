/** @file The classes from a table: 3 kB that browsers only fetch where their own Unicode is of a version that engine-classes.ts does not know. */
import { CATEGORY_RUNS } from './category-runs.ts'
import { CLASS_LETTERS, classOf, fillSpaces, LOWER, UPPER } from './classes.ts'

export function fillClasses(): void {
  let at = 0
  for (const [, letter, digits] of CATEGORY_RUNS.matchAll(/([a-z])([0-9A-Z]*)/g)) {
    const length = digits === '' ? 1 : Number.parseInt(digits, 36)
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
