/**
 * @file The error class of this package. It has the same fields as those of the other @moe packages: code, op, problem,
 * fix, details.
 */

/** Stable error codes. Test for the code, not the message. */
export type TokenizerErrorCode =
  | 'E_CONFIG'
  | 'E_DATA'
  | 'E_FORMAT'
  | 'E_UNSUPPORTED'
  | 'E_PATTERN'
  | 'E_UNKNOWN_TOKEN'
  | 'E_ABORTED'

/** The fields of a `TokenizerError`. */
export interface TokenizerErrorInfo {
  /** Stable error code. */
  readonly code: TokenizerErrorCode
  /** Function or part of the file that failed; the message starts with it. */
  readonly op: string
  /** What is wrong, including the invalid values. */
  readonly problem: string
  /** How to fix it. */
  readonly fix?: string
  /** The invalid values, for programs. */
  readonly details?: Readonly<Record<string, unknown>>
  /** The error that caused this one. */
  readonly cause?: unknown
}

/** The error of all failures that callers can cause. The message is `op: problem; fix`. */
export class TokenizerError extends Error {
  /** Stable error code. */
  readonly code: TokenizerErrorCode
  /** Function or part of the file that failed. */
  readonly op: string
  /** The invalid values by name; `{}` if the message contains everything. */
  readonly details: Readonly<Record<string, unknown>>

  /** Composes the message: `op: problem; fix`. */
  constructor(info: TokenizerErrorInfo) {
    super(
      `${info.op}: ${info.problem}${info.fix ? `; ${info.fix}` : ''}`,
      info.cause === undefined ? undefined : { cause: info.cause },
    )
    this.name = 'TokenizerError'
    this.code = info.code
    this.op = info.op
    this.details = info.details ?? {}
  }
}
