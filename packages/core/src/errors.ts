/**
 * @file The error class of all `@moe` packages, as data: a permanent code, the operation, the offending values, and a
 * fix.
 */

/** Permanent identifiers of errors. Check `code`, never the message text, which may change. */
export type ErrorCode =
  | 'E_SHAPE'
  | 'E_DTYPE'
  | 'E_ATTR'
  | 'E_BACKEND_MIX'
  | 'E_DISPOSED'
  | 'E_NO_GRADIENT'
  | 'E_UNSUPPORTED'
  | 'E_NO_BACKEND'
  | 'E_BACKEND'
  | 'E_OUT_OF_MEMORY'
  | 'E_STATE_DICT'
  | 'E_CONFIG'
  | 'E_CHECKPOINT'
  | 'E_DATA'
  | 'E_NAN'
  | 'E_ABORTED'

/** The parts of a `MoeError`. */
export interface ErrorInfo {
  /** Permanent identifier of the kind of error. */
  readonly code: ErrorCode
  /** The operation, method or file that failed. The message starts with it. */
  readonly op: string
  /** What is wrong, including the offending values. */
  readonly problem: string
  /** What the caller can do about it. */
  readonly fix?: string
  /** The offending values themselves, for programs. */
  readonly details?: Readonly<Record<string, unknown>>
  /** The error that caused this one. */
  readonly cause?: unknown
}

/** The error that every `@moe` package throws. Its message has the form `op: problem; fix`. */
export class MoeError extends Error {
  readonly #problem: string
  readonly #fix: string | undefined
  /** Permanent identifier of the kind of error. Check this rather than the message. */
  readonly code: ErrorCode
  /** The operation, method or file that failed. */
  readonly op: string
  /** The offending values by name; `{}` if the message contains everything. */
  readonly details: Readonly<Record<string, unknown>>

  /** Creates the error and its message, `op: problem; fix`. */
  constructor(info: ErrorInfo) {
    // A multi-line problem already ends with a line break.
    const separator = info.problem.endsWith('\n') ? '' : '; '
    super(
      info.fix ? `${info.op}: ${info.problem}${separator}${info.fix}` : `${info.op}: ${info.problem}`,
      info.cause === undefined ? undefined : { cause: info.cause },
    )
    this.name = 'MoeError'
    this.code = info.code
    this.op = info.op
    this.#problem = info.problem
    this.#fix = info.fix
    this.details = info.details ?? {}
  }

  /**
   * What is wrong, without `op` and fix, for an error that wraps this one. A getter, because Node would print a field a
   * second time.
   */
  get problem(): string {
    return this.#problem
  }

  /** What the caller can do about it. A getter, as `problem`. */
  get fix(): string | undefined {
    return this.#fix
  }
}

/**
 * Returns whether `value` is a `MoeError`, optionally with the given code. Errors from another copy of this package
 * count too.
 */
export function isMoeError(value: unknown, code?: ErrorCode): value is MoeError {
  return (
    value instanceof Error && value.name === 'MoeError' && (code === undefined || (value as MoeError).code === code)
  )
}

/**
 * Formats a value for an error message as it would be written in code, so that the string "3" and the number 3 differ.
 * @internal
 */
export function shown(value: unknown): string {
  if (typeof value === 'string') return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}…` : value)
  if (Array.isArray(value)) return `[${value.map(shown).join(',')}]`
  return typeof value === 'object' || typeof value === 'function' ? describe(value) : String(value)
}

/** Checks that a caller passed a function. Internal. @throws MoeError E_ATTR */
export function needFunction(op: string, fn: unknown): void {
  if (typeof fn === 'function') return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: `expected a function, got ${describe(fn)}`,
    fix: `pass one, such as ${op}(() => …)`,
  })
}

/** Describes in a few words what a caller passed by mistake. Internal. */
export function describe(value: unknown): string {
  if (value === null || value === undefined) return `${value}`
  if (value instanceof Promise) return 'a promise'
  if (Array.isArray(value)) return 'an array'
  if (typeof value === 'object') {
    const name = value.constructor?.name ?? 'bare object'
    return `${/^[AEIOU]/.test(name) ? 'an' : 'a'} ${name}`
  }
  if (typeof value === 'function') return value.name ? `the function ${value.name}` : 'a function'
  return typeof value === 'string' ? `the string ${shown(value)}` : `the ${typeof value} ${String(value).slice(0, 40)}`
}
