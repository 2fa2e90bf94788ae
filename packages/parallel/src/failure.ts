/** @file Failures of what runs in the background. */

/** Returns the promise. Its failure is that of the code that awaits it later, and not an unhandled rejection, which would end the process. */
export function awaitedLater<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => undefined)
  return promise
}

/** A failure in the background, which may happen. Race what may then never end against `promise`. */
export class Failure {
  /** Rejects with the first error that is reported. */
  readonly promise: Promise<never>
  /** Reports an error. */
  readonly report: (error: unknown) => void

  constructor() {
    let reject!: (error: unknown) => void
    this.promise = awaitedLater(
      new Promise<never>((_, fail) => {
        reject = fail
      }),
    )
    this.report = reject
  }

  /** Reports the error of a promise, and returns the promise, to be awaited later. */
  of<T>(promise: Promise<T>): Promise<T> {
    promise.catch(this.report)
    return promise
  }
}
