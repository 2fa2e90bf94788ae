/** @file What `vitest` is where there is none: its functions over Node's own test runner, with the `expect` package. */
import * as node from 'node:test'
import { expect as expectOne } from 'expect'

type Body = (...args: never[]) => unknown
type Runner = (name: string, options: object, body: Body) => unknown

/** `name` and arguments of one row: `%s` and the like in order, `$key` from an object. */
function label(name: string, row: unknown, args: readonly unknown[]): string {
  let at = 0
  const text = name.replace(/%[sidjo]/g, () => String(args[at++]))
  return text.replace(/\$(\w+)/g, (all, key) => {
    const value = (row as Record<string, unknown>)[key]
    return value === undefined ? all : String(value)
  })
}

function wrap(run: Runner) {
  // Vitest takes options in front of the body, or a time limit behind it.
  const plain = (name: string, first: Body | object, second?: Body | number) => {
    const body = typeof first === 'function' ? (first as Body) : (second as Body)
    return run(name, {}, body)
  }
  const skipIf = (condition: unknown) =>
    condition
      ? Object.assign((name: string, body: Body) => run(name, { skip: String(condition) }, body), {
          each: () => (name: string, body: Body) => run(name, { skip: String(condition) }, body),
        })
      : api
  const each = (rows: readonly unknown[]) => (name: string, body: Body) => {
    for (const row of rows) {
      const args = Array.isArray(row) ? row : [row]
      run(label(name, row, args), {}, (() => (body as (...args: unknown[]) => unknown)(...args)) as Body)
    }
  }
  const api = Object.assign(plain, {
    skipIf,
    each,
    skip: (name: string, body: Body) => run(name, { skip: true }, body),
  })
  return api
}

/** Of the test that runs: one at a time. */
const finishing: Array<() => unknown> = []
export function onTestFinished(fn: () => unknown): void {
  finishing.push(fn)
}

// The runner's context is not handed on: vitest passes none that these tests use.
const test = wrap((name, options, body) =>
  node.test(name, options, async () => {
    try {
      await (body as () => Promise<void>)()
    } finally {
      for (const fn of finishing.splice(0)) await fn()
    }
  }),
)
const describe = wrap((name, options, body) => node.describe(name, options, () => (body as () => void)()))

/** Vitest's takes a message, too. */
const expect = Object.assign((actual: unknown, _message?: string) => expectOne(actual), expectOne) as typeof expectOne

export { after as afterAll, afterEach, before as beforeAll, beforeEach } from 'node:test'
export { describe, expect, test }
