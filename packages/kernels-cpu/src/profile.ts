/** @file Where the time of a step goes: calls and time per op. */

interface Counter {
  calls: number
  milliseconds: number
}

/** Time spent in one op, launcher and kernel together. */
export interface OpProfile {
  /** Name of the op in core's tables. */
  readonly op: string
  /** How often it ran. */
  readonly calls: number
  /** Time of all calls together. */
  readonly milliseconds: number
}

/** Internal: whether ops are being timed. MOE_PROFILE=1 turns it on from the start. */
export const profiling = { on: process.env['MOE_PROFILE'] === '1' }

const counters = new Map<string, Counter>()

/** Internal: the counter of an op. */
export function counterOf(op: string): Counter {
  const known = counters.get(op)
  if (known) return known
  const fresh = { calls: 0, milliseconds: 0 }
  counters.set(op, fresh)
  return fresh
}

/** Begins to time every op of all kernels-cpu backends of this thread, from zero. Costs about 0.1 µs an op. */
export function startProfile(): void {
  for (const counter of counters.values()) counter.calls = counter.milliseconds = 0
  profiling.on = true
}

/** Ends the timing; `profile()` still tells what it found. */
export function stopProfile(): void {
  profiling.on = false
}

/** What ran since `startProfile` (or since the start, with MOE_PROFILE=1), longest first. */
export function profile(): OpProfile[] {
  return [...counters]
    .filter(([, { calls }]) => calls > 0)
    .map(([op, { calls, milliseconds }]) => ({ op, calls, milliseconds }))
    .sort((a, b) => b.milliseconds - a.milliseconds)
}
