/** @file Long work on this thread, in steps between which the event loop gets its turn: timers, signals and sockets go on. */

/** Milliseconds of work after which the event loop gets its turn. */
const AT_A_TIME = 10

/** To be awaited after each step of a long work: a turn of the event loop, when one is due. */
export function pacer(): () => Promise<void> {
  let began = performance.now()
  return async () => {
    if (performance.now() - began < AT_A_TIME) return
    await new Promise<void>(resolve => {
      // Browsers have no setImmediate.
      if (typeof setImmediate === 'function') setImmediate(resolve)
      else setTimeout(resolve)
    })
    began = performance.now()
  }
}

/** Runs a generator to its end, with a turn of the event loop where it yields. */
export async function inTurns<T>(steps: Generator<void, T>): Promise<T> {
  const paced = pacer()
  let step = steps.next()
  for (; !step.done; step = steps.next()) await paced()
  return step.value
}

/** Runs a generator to its end. */
export function atOnce<T>(steps: Generator<void, T>): T {
  let step = steps.next()
  while (!step.done) step = steps.next()
  return step.value
}
