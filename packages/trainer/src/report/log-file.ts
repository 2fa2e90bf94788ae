/** @file A file to which complete entries are appended. It never ends with a partial entry. */
import { closeSync, fstatSync, openSync, truncateSync, writeSync } from 'node:fs'
import { retryWhileBusy } from '@moe/checkpoint'
import { MoeError } from '@moe/core'

const flushBytes = 1 << 16
const flushMs = 1000

/** Buffers entries and appends them on `flush`, when many are buffered, or when a second has passed. */
export class LogFile {
  readonly path: string
  #waiting: Buffer[] = []
  /** Bytes buffered since the last attempt to write. */
  #bytes = 0
  #flushedAt = performance.now()

  constructor(path: string) {
    this.path = path
  }

  /** Number of buffered bytes. */
  get waitingBytes(): number {
    return this.#waiting.reduce((sum, { length }) => sum + length, 0)
  }

  /** Appends a value as a line of JSON. */
  line(value: unknown): void {
    this.append(Buffer.from(`${JSON.stringify(value)}\n`))
  }

  append(entry: Buffer): void {
    this.#waiting.push(entry)
    this.#bytes += entry.length
    if (this.#bytes >= flushBytes || performance.now() - this.#flushedAt >= flushMs) this.flush()
  }

  /**
   * Writes the buffered entries. If another program locks the file, as a spreadsheet does on Windows, they stay
   * buffered. If writing fails otherwise, the file is truncated to its last complete entry, and they stay buffered too.
   *
   * @throws MoeError E_CHECKPOINT
   */
  flush(): void {
    this.#flushedAt = performance.now()
    this.#bytes = 0
    try {
      this.#write()
    } catch (cause) {
      if ((cause as NodeJS.ErrnoException).code !== 'EBUSY') throw writingFailed(this.path, cause)
    }
  }

  /**
   * Writes the buffered entries, with retries for about a second. @throws MoeError E_CHECKPOINT if they cannot be
   * written
   */
  async close(): Promise<void> {
    try {
      await retryWhileBusy(() => this.#write())
    } catch (cause) {
      throw writingFailed(this.path, cause)
    }
  }

  #write(): void {
    if (this.#waiting.length === 0) return
    appendWhole(this.path, Buffer.concat(this.#waiting))
    this.#waiting = []
  }
}

export const writingFailed = (path: string, cause: unknown) =>
  new MoeError({
    code: 'E_CHECKPOINT',
    op: path,
    problem: `writing failed: ${(cause as Error).message}`,
    fix: 'free disk space or close programs that have the file open, then resume; checkpoints and earlier lines are intact',
    cause,
  })

function appendWhole(path: string, bytes: Buffer): void {
  const file = openSync(path, 'a')
  try {
    const before = fstatSync(file).size
    try {
      for (let at = 0; at < bytes.length; ) at += writeSync(file, bytes, at)
    } catch (error) {
      // By path, because Windows cannot truncate a file that is open for appending.
      truncateSync(path, before)
      throw error
    }
  } finally {
    closeSync(file)
  }
}
