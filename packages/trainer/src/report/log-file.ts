/** @file A file that grows by whole entries and never ends in half of one. */
import { closeSync, fstatSync, openSync, truncateSync, writeSync } from 'node:fs'
import { patiently } from '@moe/checkpoint'
import { MoeError } from '@moe/core'

const flushBytes = 1 << 16
const flushMs = 1000

/** Appends entries; they reach the file by `flush`, or when many wait or a second has passed. */
export class LogFile {
  readonly path: string
  #waiting: Buffer[] = []
  /** Since the last attempt to write. */
  #bytes = 0
  #flushedAt = performance.now()

  constructor(path: string) {
    this.path = path
  }

  /** Bytes that have not reached the file. */
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
   * Writes what waits. While another program has the file to itself, as a spreadsheet on Windows, the entries wait on. If it fails otherwise, the file is
   * cut back to its last whole entry and they wait, too.
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

  /** Writes what waits, at the end: it must go now, or in about a second. @throws MoeError E_CHECKPOINT */
  async close(): Promise<void> {
    try {
      await patiently(() => this.#write())
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
    fix: 'free some space or close what has the file open, then resume; checkpoints and earlier lines are whole',
    cause,
  })

function appendWhole(path: string, bytes: Buffer): void {
  const file = openSync(path, 'a')
  try {
    const before = fstatSync(file).size
    try {
      for (let at = 0; at < bytes.length; ) at += writeSync(file, bytes, at)
    } catch (error) {
      // By path, because on Windows what is open for appending cannot be cut.
      truncateSync(path, before)
      throw error
    }
  } finally {
    closeSync(file)
  }
}
