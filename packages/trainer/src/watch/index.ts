/** @file Runs in a browser while they go on: what the command `moe-trainer watch` serves. */
export type { LoggedCurve } from './logged-numbers.ts'
export { type Watcher, type WatchOptions, watchRuns } from './watch-runs.ts'
export type { HeldOutPoint, RunState, RunStatus } from './watched-run.ts'
