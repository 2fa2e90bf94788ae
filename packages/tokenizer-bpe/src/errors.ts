/** @file The one error class of this package, in the shape that every @moe package uses: code, op, problem, fix, details. */

/** Permanent identities of errors. Test on `code`, never on the text. */
export type TokenizerErrorCode =
  | 'E_CONFIG'
  | 'E_DATA'
  | 'E_FORMAT'
  | 'E_UNSUPPORTED'
  | 'E_PATTERN'
  | 'E_UNKNOWN_TOKEN'
  | 'E_ABORTED'

/** What a `TokenizerError` is made of. */
export interface TokenizerErrorInfo {
  /** Its permanent identity. */
  readonly code: TokenizerErrorCode
  /** Function or part of the file that failed; starts the message. */
  readonly op: string
  /** What is wrong, with the offending values. */
  readonly problem: string
  /** What the caller can do about it. */
  readonly fix?: string
  /** The values themselves, for programs. */
  readonly details?: Readonly<Record<string, unknown>>
  /** The error that led to this one. */
  readonly cause?: unknown
}

/** Every failure of this package that a caller can cause: `op: problem; fix`. */
export class TokenizerError extends Error {
  /** Its permanent identity: test on this. */
  readonly code: TokenizerErrorCode
  /** Function or part of the file that failed. */
  readonly op: string
  /** The offending values, by name; `{}` when there are none beyond the message. */
  readonly details: Readonly<Record<string, unknown>>

  /** Writes the message: `op: problem; fix`. */
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
