/** @file Long work on this thread, in steps between which the event loop gets its turn: timers, signals and sockets go on. */

/** A turn of the event loop. @internal */
export function eventLoopTurn(): Promise<void> {
  if (typeof setImmediate === 'function') return new Promise(resolve => setImmediate(resolve))
  // Browsers have no setImmediate, and timers that set each other wait for 4 ms there.
  return new Promise(resolve => {
    const { port1, port2 } = new MessageChannel()
    port1.addEventListener('message', () => {
      port1.close()
      resolve()
    })
    port1.start()
    port2.postMessage(null)
  })
}

/** Milliseconds of work after which the event loop gets its turn. */
const AT_A_TIME = 10

/** To be awaited after each step of a long work: a turn of the event loop, when one is due. */
export function pacer(): () => Promise<void> {
  let began = performance.now()
  return async () => {
    if (performance.now() - began < AT_A_TIME) return
    await eventLoopTurn()
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
