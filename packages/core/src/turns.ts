/**
 * @file Splits long work on the main thread into steps and yields to the event loop between them, so that timers,
 * signals and sockets keep working.
 */

/** Yields to the event loop once. @internal */
export function yieldToEventLoop(): Promise<void> {
  if (typeof setImmediate === 'function') return new Promise(resolve => setImmediate(resolve))
  // Browsers have no setImmediate, and nested timers wait at least 4 ms there.
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

/** Milliseconds of work before yielding to the event loop. */
const WORK_MS = 10

/** Returns a function to await after each step of long work. It yields to the event loop if enough time has passed. */
export function pacer(): () => Promise<void> {
  let began = performance.now()
  return async () => {
    if (performance.now() - began < WORK_MS) return
    await yieldToEventLoop()
    began = performance.now()
  }
}

/** Runs a generator to its end, and may yield to the event loop wherever the generator yields. */
export async function runYielding<T>(steps: Generator<void, T>): Promise<T> {
  const paced = pacer()
  let step = steps.next()
  for (; !step.done; step = steps.next()) await paced()
  return step.value
}

/** Runs a generator to its end synchronously. */
export function runSync<T>(steps: Generator<void, T>): T {
  let step = steps.next()
  while (!step.done) step = steps.next()
  return step.value
}
