/** @file The interface of what a run writes and resumes from. */
import type { FolderLocation } from '@moe/checkpoint'
import type { TrainListener } from '../events.ts'
import type { MetricsLine } from '../report/metrics-log.ts'
import type { TrainResult } from '../result.ts'

/** A complete checkpoint. */
export interface StoredCheckpoint {
  /** Its name in events, results and errors. */
  readonly path: string
  readonly location: FolderLocation
}

/** Log of the run's steps. `LogFile` implements it. */
export interface StepsLog {
  line(value: MetricsLine): void
  flush(): void
  close(): Promise<void>
}

/** What a run writes, and resumes from. */
export interface RunFolder {
  /** Its name in events and errors. */
  readonly path: string
  /** Undefined if steps are not logged. */
  readonly log?: StepsLog
  /** Listeners that write the other logs. */
  readonly listeners: readonly TrainListener[]
  /** The checkpoint that was saved last. */
  latest(): Promise<StoredCheckpoint | undefined>
  /** The checkpoint at a path. */
  named(path: string): Promise<StoredCheckpoint>
  /** All other checkpoints, latest first. */
  others(checkpoint: StoredCheckpoint): Promise<readonly StoredCheckpoint[]>
  /** Locks the folder for one training. @returns unlocks it @throws MoeError E_CONFIG */
  lock(): () => void
  /** Removes an earlier run. @throws MoeError E_CONFIG */
  clear(): Promise<void>
  /** Truncates the logs to the step of a checkpoint. @param onLine is called with each line of `log` that remains */
  truncateLogs(step: number, onLine: (line: MetricsLine) => void): Promise<void>
  /**
   * Saves a checkpoint, completely or not at all, and keeps the last `keep`.
   *
   * @param write fills a folder; the file that makes the checkpoint complete must come last
   * @throws MoeError E_CHECKPOINT; all earlier checkpoints then stay intact
   */
  publish(step: number, keep: number, write: (location: FolderLocation) => Promise<void>): Promise<StoredCheckpoint>
  /** Writes `summary.json`. */
  writeSummary(result: TrainResult): Promise<void>
}
