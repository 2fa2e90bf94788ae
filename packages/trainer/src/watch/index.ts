/** @file Public API of @moe/trainer/watch: the dashboard that `moe-trainer watch` serves. */
export type { LoggedCurve } from './logged-numbers.ts'
export { type Watcher, type WatchOptions, watchRuns } from './watch-runs.ts'
export type { RunState, RunStatus, ValidationPoint } from './watched-run.ts'
