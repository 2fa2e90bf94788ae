/** @file `metrics.jsonl`: one JSON object per step. */
import { existsSync, readFileSync } from 'node:fs'
import { pathOf } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import type { StepEvent } from '../events.ts'

/** A line of `metrics.jsonl`: a `step` event without its type, with its metrics as additional members. */
export interface MetricsLine {
  /** Number of the step, from 1. */
  readonly step: number
  /** The minimized loss, including auxiliary terms. */
  readonly loss: number
  /** Negative log-likelihood in nats per predicted token. */
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
 * Returns the lines of a `metrics.jsonl` up to a step. Reading stops at the first unreadable line (a crash may leave a
 * partial one).
 */
export function readMetrics(path: string | URL, upToStep?: number): MetricsLine[] {
  return readLines<MetricsLine>('readMetrics', path, upToStep)
}

/** Reads the lines of any log whose lines have a step. @internal */
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
      problem: folder ? 'this is a folder' : `cannot read the file: ${(cause as Error).message}`,
      fix: folder ? `pass the ${op === 'readLoads' ? 'loads' : 'metrics'}.jsonl of a run` : undefined,
      cause,
    })
  }
}
