/** @file Profiling: number of calls and time per op. */

interface Counter {
  calls: number
  milliseconds: number
}

/** Time spent in one op, including its launcher. */
export interface OpProfile {
  /** Name of the op, as in @moe/core. */
  readonly op: string
  /** Number of calls. */
  readonly calls: number
  /** Total time of all calls. */
  readonly milliseconds: number
}

/** Whether ops are being timed. MOE_PROFILE=1 enables this from the start. */
export const profiling = { on: process.env['MOE_PROFILE'] === '1' }

const counters = new Map<string, Counter>()

/** The counter of an op. */
export function counterOf(op: string): Counter {
  const known = counters.get(op)
  if (known) return known
  const fresh = { calls: 0, milliseconds: 0 }
  counters.set(op, fresh)
  return fresh
}

/** Starts timing every op of all kernels-cpu backends in this thread, from zero. Costs about 0.1 µs per op. */
export function startProfile(): void {
  for (const counter of counters.values()) counter.calls = counter.milliseconds = 0
  profiling.on = true
}

/** Stops timing. `profile()` still returns what was recorded. */
export function stopProfile(): void {
  profiling.on = false
}

/** The ops that ran since `startProfile` (or since the start, with MOE_PROFILE=1), slowest first. */
export function profile(): OpProfile[] {
  return [...counters]
    .filter(([, { calls }]) => calls > 0)
    .map(([op, { calls, milliseconds }]) => ({ op, calls, milliseconds }))
    .sort((a, b) => b.milliseconds - a.milliseconds)
}
