/** @file Global settings that a function changes for as long as it runs. */
import { MoeError, needFunction } from './errors.ts'

/** A global value, which `during` replaces while a function runs. */
export class Setting<T> {
  value: T

  constructor(value: T) {
    this.value = value
  }

  /** Runs a synchronous function with another value. @throws MoeError E_ATTR if it returns a promise */
  during<R>(op: string, value: T, fn: () => R): R {
    needFunction(op, fn)
    const before = this.value
    this.value = value
    try {
      return synchronous(op, fn())
    } finally {
      this.value = before
    }
  }
}

/** The setting ends when the function returns, so asynchronous work would run without it. */
function synchronous<T>(op: string, result: T): T {
  if (!(result instanceof Promise)) return result
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: 'the function returned a promise, but the setting ends before it settles',
    fix: 'pass a synchronous function and await its result outside',
  })
}
