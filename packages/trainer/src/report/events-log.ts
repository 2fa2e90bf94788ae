/** @file `events.jsonl`: the events of a run except its steps, one per line. */
import type { TrainEvent } from '../events.ts'
import { LogFile } from './log-file.ts'

/**
 * A listener that writes all events with their time (ISO 8601), except steps (in `metrics.jsonl`), loads (in
 * `loads.jsonl`) and the progress of evaluations. A resumed run appends a `start` event, whose `fromStep` is the step
 * that it resumed from.
 */
export function eventsLog(path: string): (event: TrainEvent) => void {
  const file = new LogFile(path)
  // A run that fails before its start does not own the folder.
  let started = false
  return event => {
    started ||= event.type === 'start'
    if (!started || notWritten.has(event.type)) return
    file.line({
      time: new Date().toISOString(),
      ...event,
      ...(event.type === 'fail' && { error: describe(event.error) }),
    })
    file.flush()
  }
}

const notWritten: ReadonlySet<TrainEvent['type']> = new Set(['step', 'loads', 'evaluating'])

const describe = (error: unknown) =>
  error instanceof Error ? { name: error.name, message: error.message } : `${error}`
