/** @file `metrics.jsonl`: one JSON object a step, in a file that never ends in half a line. */
import { closeSync, existsSync, fstatSync, openSync, readFileSync, truncateSync, writeSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { pathOf, patiently, renamePatiently } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import type { StepEvent } from '../events.ts'

/** A line of the log: the step's event without its type, its metrics beside the rest. */
export interface MetricsLine {
  readonly step: number
  readonly loss: number
  readonly nll: number
  readonly lr: number
  readonly gradNorm: number
  readonly tokens: number
  readonly tokensPerSecond: number
  readonly [metric: string]: number
}

export function metricsLine({
  step,
  loss,
  nll,
  lr,
  gradNorm,
  tokens,
  tokensPerSecond,
  metrics,
}: StepEvent): MetricsLine {
  return { step, loss, nll, lr, gradNorm, tokens, tokensPerSecond, ...metrics }
}

const flushBytes = 1 << 16
const flushMs = 1000

/** Appends lines; they reach the file by `flush`, or when many wait or a second has passed. */
export class MetricsLog {
  readonly path: string
  #waiting: string[] = []
  #waitingBytes = 0
  #flushedAt = performance.now()

  constructor(path: string) {
    this.path = path
  }

  append(line: MetricsLine): void {
    const text = `${JSON.stringify(line)}\n`
    this.#waiting.push(text)
    this.#waitingBytes += text.length
    if (this.#waitingBytes >= flushBytes || performance.now() - this.#flushedAt >= flushMs) this.flush()
  }

  /**
   * Writes what waits. While another program has the file to itself, as a spreadsheet on Windows, the lines wait on. If it fails otherwise, the file is
   * cut back to its last whole line and they wait, too.
   * @throws MoeError E_CHECKPOINT
   */
  flush(): void {
    this.#flushedAt = performance.now()
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
    appendWhole(this.path, Buffer.from(this.#waiting.join('')))
    this.#waiting = []
    this.#waitingBytes = 0
  }
}

const writingFailed = (path: string, cause: unknown) =>
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

/**
 * Lines of a log up to a step. Lines that cannot be read (a crash may leave half of one) and everything after them are
 * left out.
 */
export function readMetrics(path: string | URL, upToStep = Number.POSITIVE_INFINITY): MetricsLine[] {
  const file = pathOf('readMetrics', path)
  if (!existsSync(file)) return []
  const lines: MetricsLine[] = []
  for (const text of readLog(file).split('\n')) {
    if (text === '') continue
    try {
      const line = JSON.parse(text) as MetricsLine
      if (line.step <= upToStep) lines.push(line)
    } catch {
      break
    }
  }
  return lines
}

function readLog(path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch (cause) {
    const folder = (cause as NodeJS.ErrnoException).code === 'EISDIR'
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: folder ? 'it is a folder' : `cannot be read: ${(cause as Error).message}`,
      fix: folder ? 'pass the metrics.jsonl of a run' : undefined,
      cause,
    })
  }
}

/** Drops the lines after a step, which a resumed run will write again. @throws MoeError E_CHECKPOINT */
export async function cutMetrics(path: string, upToStep: number): Promise<MetricsLine[]> {
  const lines = readMetrics(path, upToStep)
  if (existsSync(path)) {
    const temporary = `${path}.tmp`
    try {
      await writeFile(temporary, lines.map(line => `${JSON.stringify(line)}\n`).join(''))
      await renamePatiently(temporary, path)
    } catch (cause) {
      throw writingFailed(path, cause)
    }
  }
  return lines
}
