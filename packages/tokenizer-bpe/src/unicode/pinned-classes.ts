/** @file The classes from a table: 3 kB that browsers only fetch where their own Unicode is of a version that engine-classes.ts does not know. */
import { CATEGORY_RUNS } from './category-runs.ts'
import { fillRuns } from './classes.ts'

export function fillClasses(): void {
  fillRuns(CATEGORY_RUNS)
}
