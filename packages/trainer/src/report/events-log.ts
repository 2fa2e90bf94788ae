/** @file `events.jsonl`: what happened to a run beside its steps, a line an event. */
import type { TrainEvent } from '../events.ts'
import { LogFile } from './log-file.ts'

/**
 * A listener that writes every event but steps (they are in `metrics.jsonl`), loads (in `loads.jsonl`) and how far a measurement is, with the time as ISO 8601.
 * A run that goes on appends: each part of it begins with its `start`, whose `fromStep` says what it goes on from.
 */
export function eventsLog(path: string): (event: TrainEvent) => void {
  const file = new LogFile(path)
  // What fails before has not got the folder.
  let started = false
  return event => {
    started ||= event.type === 'start'
    if (!started || elsewhere.has(event.type)) return
    file.line({ time: new Date().toISOString(), ...event, ...(event.type === 'fail' && { error: told(event.error) }) })
    file.flush()
  }
}

const elsewhere: ReadonlySet<TrainEvent['type']> = new Set(['step', 'loads', 'measuring'])

const told = (error: unknown) => (error instanceof Error ? { name: error.name, message: error.message } : `${error}`)
