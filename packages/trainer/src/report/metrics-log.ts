/** @file `metrics.jsonl`: one JSON object a step, in a file that never ends in half a line. */
import { closeSync, existsSync, fstatSync, openSync, readFileSync, truncateSync, writeSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { renamePatiently } from '@moe/checkpoint'
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
   * Writes what waits. If that fails, the file is cut back to its last whole line and the lines keep waiting.
   * @throws MoeError E_CHECKPOINT
   */
  flush(): void {
    if (this.#waiting.length === 0) return
    const bytes = Buffer.from(this.#waiting.join(''))
    try {
      appendWhole(this.path, bytes)
    } catch (cause) {
      throw writingFailed(this.path, cause)
    }
    this.#waiting = []
    this.#waitingBytes = 0
    this.#flushedAt = performance.now()
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
export function readMetrics(path: string, upToStep = Number.POSITIVE_INFINITY): MetricsLine[] {
  if (!existsSync(path)) return []
  const lines: MetricsLine[] = []
  for (const text of readFileSync(path, 'utf8').split('\n')) {
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
