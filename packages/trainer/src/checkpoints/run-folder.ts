/** @file Where a run is kept: the one place that knows whether that is a folder of the disk or one that a page has a handle of. */
import { type DirectoryHandle, type FolderPlace, isDirectoryHandle } from '@moe/checkpoint'
import type { TrainListener } from '../events.ts'
import type { MetricsLine } from '../report/metrics-log.ts'
import type { TrainResult } from '../result.ts'
import { DiskRun } from './disk-run.ts'
import { HandleRun } from './handle-run.ts'

/** A checkpoint that is whole. */
export interface StoredCheckpoint {
  /** What events, results and errors call it. */
  readonly path: string
  readonly place: FolderPlace
}

/** Lines of the run's steps; `LogFile` is one. */
export interface StepsLog {
  line(value: MetricsLine): void
  flush(): void
  close(): Promise<void>
}

/** What a run writes, and goes on from. */
export interface RunFolder {
  /** What events and errors call it. */
  readonly path: string
  /** Undefined where no line is kept. */
  readonly log?: StepsLog
  /** They write what else happens. */
  readonly listeners: readonly TrainListener[]
  /** The one that was saved last. */
  latest(): Promise<StoredCheckpoint | undefined>
  /** The one that is called so. */
  named(path: string): Promise<StoredCheckpoint>
  /** All but one, the latest first. */
  others(checkpoint: StoredCheckpoint): Promise<readonly StoredCheckpoint[]>
  /** Takes the folder for one training. @returns gives it back @throws MoeError E_CONFIG */
  lock(): () => void
  /** Removes an earlier run. @throws MoeError E_CONFIG */
  clear(): Promise<void>
  /** Cuts what is written of steps back to one that is gone on from. Its lines up to there. */
  truncateLogs(step: number): Promise<readonly MetricsLine[]>
  /**
   * Adds a checkpoint that is whole or not there, and lets the last `keep` stay.
   * @param write fills a folder; what makes a checkpoint complete comes last
   * @throws MoeError E_CHECKPOINT; every earlier checkpoint is whole then
   */
  publish(step: number, keep: number, write: (place: FolderPlace) => Promise<void>): Promise<StoredCheckpoint>
  /** Writes what the run came to. */
  writeSummary(result: TrainResult): Promise<void>
}

/** The folder of a run; nothing is asked of it yet. @throws MoeError E_UNSUPPORTED for a path in a browser */
export const runFolder = (out: string | DirectoryHandle): RunFolder =>
  isDirectoryHandle(out) ? new HandleRun(out) : new DiskRun(out)
