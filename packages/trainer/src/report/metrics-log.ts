/** @file `metrics.jsonl`: one JSON object a step. */
import { existsSync, readFileSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { pathOf, renamePatiently } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import type { StepEvent } from '../events.ts'
import { writingFailed } from './log-file.ts'

/** A line of the log: the step's event without its type, its metrics beside the rest. */
export interface MetricsLine {
  /** 1 for the first. */
  readonly step: number
  /** What was minimised. */
  readonly loss: number
  /** Nats per predicted token. */
  readonly nll: number
  /** Learning rate of the step. */
  readonly lr: number
  /** Norm of all gradients before clipping. */
  readonly gradNorm: number
  /** Positions trained on so far. */
  readonly tokens: number
  /** Positions per second of this step. */
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

/**
 * Lines of a log up to a step. Lines that cannot be read (a crash may leave half of one) and everything after them are
 * left out.
 */
export function readMetrics(path: string | URL, upToStep?: number): MetricsLine[] {
  return readLines<MetricsLine>('readMetrics', path, upToStep)
}

/** Internal. The same for lines of any kind that have a step. */
export function readLines<Line extends { readonly step: number }>(
  op: string,
  path: string | URL,
  upToStep = Number.POSITIVE_INFINITY,
): Line[] {
  const file = pathOf(op, path)
  if (!existsSync(file)) return []
  const lines: Line[] = []
  for (const text of readLog(op, file).split('\n')) {
    if (text === '') continue
    try {
      const line = JSON.parse(text) as Line
      if (line.step <= upToStep) lines.push(line)
    } catch {
      break
    }
  }
  return lines
}

function readLog(op: string, path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch (cause) {
    const folder = (cause as NodeJS.ErrnoException).code === 'EISDIR'
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: folder ? 'it is a folder' : `cannot be read: ${(cause as Error).message}`,
      fix: folder ? `pass the ${op === 'readLoads' ? 'loads' : 'metrics'}.jsonl of a run` : undefined,
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
