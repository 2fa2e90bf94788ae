/** @file A run in a folder on disk. */
import { existsSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { type FolderLocation, pathOf } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import type { TrainListener } from '../events.ts'
import { cutLog } from '../report/cut-log.ts'
import { eventsLog } from '../report/events-log.ts'
import { loadsLog } from '../report/loads-log.ts'
import { LogFile } from '../report/log-file.ts'
import type { MetricsLine } from '../report/metrics-log.ts'
import { writeSummary } from '../report/summary.ts'
import type { TrainResult } from '../result.ts'
import { latestCheckpoint, otherCheckpoints, publishCheckpoint, stepsAfter } from './checkpoint-folder.ts'
import { lockFolder } from './folder-lock.ts'
import type { RunFolder, StoredCheckpoint } from './run-folder.ts'

const stored = (path: string): StoredCheckpoint => ({ path, location: path })

export class DiskRun implements RunFolder {
  readonly path: string
  readonly log: LogFile
  readonly listeners: readonly TrainListener[]
  /** Steps of checkpoints after the one that this run was resumed from, as far as it has not reached them. */
  #abandoned: readonly number[] = []

  constructor(out: string) {
    this.path = pathOf('train', out)
    this.log = new LogFile(this.#file('metrics.jsonl'))
    this.listeners = [eventsLog(this.#file('events.jsonl')), loadsLog(this.#file('loads.jsonl'))]
  }

  #file(name: string): string {
    return join(this.path, name)
  }

  async latest() {
    const path = latestCheckpoint(this.path)
    return path === undefined ? undefined : stored(path)
  }

  async named(path: string) {
    if (existsSync(path)) return stored(path)
    const latest = latestCheckpoint(this.path)
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: 'cannot resume from it: there is no such folder',
      fix:
        latest === undefined
          ? 'pass a step-… folder in the checkpoints folder of a run'
          : `the latest checkpoint of the run is ${latest}`,
    })
  }

  async others({ path }: StoredCheckpoint) {
    return otherCheckpoints(path).map(stored)
  }

  lock() {
    return lockFolder(this.path)
  }

  async clear() {
    try {
      for (const name of ['checkpoints', 'metrics.jsonl', 'loads.jsonl', 'events.jsonl', 'summary.json'])
        rmSync(this.#file(name), { recursive: true, force: true })
    } catch (cause) {
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'train',
        problem: `cannot remove the run in ${this.path}: ${(cause as Error).message}`,
        fix: 'choose another out',
        cause,
      })
    }
  }

  async truncateLogs(step: number, onLine: (line: MetricsLine) => void) {
    await cutLog(this.log.path, step, onLine)
    await cutLog(this.#file('loads.jsonl'), step)
    this.#abandoned = stepsAfter(this.path, step)
  }

  async publish(step: number, keep: number, write: (location: FolderLocation) => Promise<void>) {
    const path = await publishCheckpoint(this.path, step, keep, write, this.#abandoned)
    this.#abandoned = this.#abandoned.filter(other => other > step)
    return stored(path)
  }

  writeSummary(result: TrainResult) {
    return writeSummary(this.path, result)
  }
}
