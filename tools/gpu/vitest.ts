/**
 * @file A substitute for `vitest` on machines without it: vitest's functions, based on the `expect` package, and `runTests`, which runs the declared tests one after
 * another. Each line of the report is written before anything else happens: if a kernel hangs, the process must be killed, and the report must contain the
 * earlier results and the name of the test.
 */
import { expect as expectOne } from 'expect'

type Body = (...args: never[]) => unknown
type Hook = () => unknown
type Kind = 'beforeAll' | 'beforeEach' | 'afterEach' | 'afterAll'

interface Suite {
  readonly name: string
  readonly parent: Suite | undefined
  readonly hooks: Record<Kind, Hook[]>
  /** Declares its children. It runs when it is the suite's turn, and may be asynchronous. */
  readonly body: Body
  readonly children: Array<Suite | Test>
}
interface Test {
  readonly suite: Suite
  readonly name: string
  readonly skipped: boolean
  readonly body: Body
}

/** A line of the report. `lost`: the process can no longer use the device. */
export type Line =
  | { readonly tests: number }
  | { readonly start: number; readonly name: string }
  | { readonly end: 'passed' | 'skipped' }
  | { readonly end: 'failed'; readonly error: string; readonly lost: boolean }

const finishing: Hook[] = []
const file = suiteOf('', undefined, () => {})
let current = file

function suiteOf(name: string, parent: Suite | undefined, body: Body): Suite {
  const hooks = { beforeAll: [], beforeEach: [], afterEach: [], afterAll: [] }
  return { name, parent, hooks, body, children: [] }
}

function addSuite(name: string, body: Body, skipped: boolean): void {
  // The body may need what the suite is skipped for lack of.
  if (skipped) {
    addTest(name, body, true)
    return
  }
  current.children.push(suiteOf(name, current, body))
}

function addTest(name: string, body: Body, skipped: boolean): void {
  current.children.push({ suite: current, name, body, skipped })
}

/** All tests of a suite, in the order of their declaration. */
async function testsOf(suite: Suite): Promise<Test[]> {
  current = suite
  await (suite.body as Hook)()
  const tests: Test[] = []
  for (const child of suite.children) tests.push(...('children' in child ? await testsOf(child) : [child]))
  return tests
}

/** Formats a test's name with the arguments of one row: `%s` and similar in order, `$key` from an object. */
function label(name: string, row: unknown, args: readonly unknown[]): string {
  let at = 0
  const text = name.replace(/%[sidjo]/g, () => String(args[at++]))
  return text.replace(/\$(\w+)/g, (all, key) => {
    const value = (row as Record<string, unknown>)[key]
    return value === undefined ? all : String(value)
  })
}

type Add = (name: string, body: Body, skipped: boolean) => void

function wrap(add: Add, skipped = false) {
  // Vitest accepts options before the body, or a timeout after it.
  const plain = (name: string, first: Body | object, second?: Body | number) =>
    add(name, (typeof first === 'function' ? first : second) as Body, skipped)
  const each =
    (rows: readonly unknown[]) =>
    (name: string, first: Body | object, second?: Body | number): void => {
      for (const row of rows) {
        const args = Array.isArray(row) ? row : [row]
        const body = (typeof first === 'function' ? first : second) as (...args: unknown[]) => unknown
        add(label(name, row, args), (() => body(...args)) as Body, skipped)
      }
    }
  const skip = (name: string, body: Body) => add(name, body, true)
  return Object.assign(plain, { each, skip, skipIf: (condition: unknown) => wrapped(add, skipped || !!condition) })
}
// Without an annotation, its type would refer to itself.
const wrapped: (add: Add, skipped: boolean) => Wrapped = wrap
interface Wrapped {
  (name: string, first: Body | object, second?: Body | number): void
  each(rows: readonly unknown[]): (name: string, first: Body | object, second?: Body | number) => void
  skip(name: string, body: Body): void
  skipIf(condition: unknown): Wrapped
}

const hook = (kind: Kind) => (fn: Hook) => {
  current.hooks[kind].push(fn)
}
/** Outermost first. */
const suitesOf = (suite: Suite | undefined): Suite[] => (suite === undefined ? [] : [...suitesOf(suite.parent), suite])

async function call(hooks: readonly Hook[]): Promise<void> {
  for (const fn of hooks) await fn()
}

async function runOne({ suite, body }: Test): Promise<void> {
  const suites = suitesOf(suite)
  try {
    await call(suites.flatMap(({ hooks }) => hooks.beforeEach))
    await (body as Hook)()
  } finally {
    await call(finishing.splice(0))
    await call(suites.reverse().flatMap(({ hooks }) => hooks.afterEach))
  }
}

function failure(error: unknown): Line {
  const text =
    error instanceof Error ? `${error.message}\n${error.stack?.match(/\S+\.test\.ts:\d+/)?.[0] ?? ''}` : String(error)
  const cause =
    error instanceof Error && error.cause instanceof Error && !error.message.includes(error.cause.message)
      ? `\n${error.cause.message}`
      : ''
  return { end: 'failed', error: (text + cause).slice(0, 4000), lost: isLost(error) }
}

/** Whether the error, or one of its causes, is a MoeError after which this process can no longer use the device. */
export function isLost(error: unknown): boolean {
  if (!(error instanceof Error)) return false
  return (error as { details?: { lost?: unknown } }).details?.lost === true || isLost(error.cause)
}

/**
 * Runs the declared tests from number `from` on whose name matches `fits`. Resolves to whether all passed.
 * @param report Called with each line as it occurs; must be synchronous.
 */
export async function runTests(from: number, fits: RegExp, report: (line: Line) => void): Promise<boolean> {
  const tests = await testsOf(file)
  report({ tests: tests.length })
  const opened: Suite[] = []
  let good = true
  const attempt = async (fn: () => Promise<void>): Promise<boolean> => {
    try {
      await fn()
      return true
    } catch (error) {
      const line = failure(error)
      report(line)
      good = false
      // Results of later tests would be meaningless.
      if ('lost' in line && line.lost) process.exit(1)
      return false
    }
  }
  for (const [i, test] of tests.entries()) {
    if (i < from) continue
    const name = [...suitesOf(test.suite), test]
      .map(({ name }) => name)
      .filter(Boolean)
      .join(' > ')
    if (!fits.test(name)) continue
    report({ start: i, name })
    if (test.skipped) {
      report({ end: 'skipped' })
      continue
    }
    const passed = await attempt(async () => {
      for (const suite of suitesOf(test.suite)) {
        if (opened.includes(suite)) continue
        opened.push(suite)
        await call(suite.hooks.beforeAll)
      }
      await runOne(test)
    })
    if (passed) report({ end: 'passed' })
  }
  for (const suite of opened.reverse()) await attempt(() => call(suite.hooks.afterAll))
  return good
}

/** Registers a hook for the current test; tests run one at a time. */
export function onTestFinished(fn: Hook): void {
  finishing.push(fn)
}
export const afterAll = hook('afterAll')
export const afterEach = hook('afterEach')
export const beforeAll = hook('beforeAll')
export const beforeEach = hook('beforeEach')
export const test = wrap(addTest)
export const describe = wrap(addSuite)
/** Like vitest's, accepts a message, which is often the only hint at where it failed. */
export const expect = Object.assign((actual: unknown, message?: string) => {
  const matchers = expectOne(actual)
  if (message === undefined) return matchers
  return new Proxy(matchers, {
    get(target, name) {
      const matcher = Reflect.get(target, name)
      if (typeof matcher !== 'function') return matcher
      return (...args: unknown[]) => {
        try {
          return matcher(...args)
        } catch (error) {
          throw new Error(`${message}\n${error instanceof Error ? error.message : error}`, { cause: error })
        }
      }
    },
  })
}, expectOne) as typeof expectOne
