/** @file Public interface of @moe/trainer/watch. */
export { type Watcher, type WatchOptions, watchRuns } from './watch-runs.ts'
export type { HeldOutPoint, RunState, RunStatus } from './watched-run.ts'
