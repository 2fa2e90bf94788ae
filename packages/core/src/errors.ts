/** @file The one error class of @moe, as data: a permanent code, the op, the offending values, and what to do. */

/** Permanent identities of errors. Test on `code`, never on the text. */
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

/** What a `MoeError` is made of. */
export interface ErrorInfo {
  /** Its permanent identity. */
  readonly code: ErrorCode
  /** Op, method or file that failed; starts the message. */
  readonly op: string
  /** What is wrong, with both offending values. */
  readonly problem: string
  /** What the caller can do about it. */
  readonly fix?: string
  /** The values themselves, for programs. */
  readonly details?: Readonly<Record<string, unknown>>
  /** The error that led to this one. */
  readonly cause?: unknown
}

/** Every failure of the `@moe` packages: `op: problem; fix`. */
export class MoeError extends Error {
  readonly #problem: string
  /** Its permanent identity: test on this. */
  readonly code: ErrorCode
  /** Op, method or file that failed. */
  readonly op: string
  /** The offending values, by name; `{}` when there are none beyond the message. */
  readonly details: Readonly<Record<string, unknown>>

  /** Writes the message: `op: problem; fix`. */
  constructor(info: ErrorInfo) {
    // A problem that is a list ends its last line itself.
    const separator = info.problem.endsWith('\n') ? '' : '; '
    super(
      info.fix ? `${info.op}: ${info.problem}${separator}${info.fix}` : `${info.op}: ${info.problem}`,
      info.cause === undefined ? undefined : { cause: info.cause },
    )
    this.name = 'MoeError'
    this.code = info.code
    this.op = info.op
    this.#problem = info.problem
    this.details = info.details ?? {}
  }

  /** What is wrong, without op and fix: for an error that has this one as its cause. Not a field, which Node would print once more. */
  get problem(): string {
    return this.#problem
  }
}

/** Whether a value is a MoeError (of any copy of this package), optionally with the given code. */
export function isMoeError(value: unknown, code?: ErrorCode): value is MoeError {
  return (
    value instanceof Error && value.name === 'MoeError' && (code === undefined || (value as MoeError).code === code)
  )
}

/** A value in a message as it would be written in code, so that the string "3" is not taken for the number. @internal */
export function shown(value: unknown): string {
  if (typeof value === 'string') return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}…` : value)
  if (Array.isArray(value)) return `[${value.map(shown).join(',')}]`
  return typeof value === 'object' || typeof value === 'function' ? describe(value) : String(value)
}

/** Internal: what a caller passed by mistake, in a few words. */
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
