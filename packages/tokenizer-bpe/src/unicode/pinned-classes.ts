/**
 * @file Fills the classes from a table. Browsers load these 3 kB only if engine-classes.ts does not know their Unicode.
 */
import { CATEGORY_RUNS } from './category-runs.ts'
import { fillRuns } from './classes.ts'

export function fillFromTable(): void {
  fillRuns(CATEGORY_RUNS)
}
