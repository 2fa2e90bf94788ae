/** @file Errors in OpenAI's format. OpenAI's libraries choose the class that they throw by the HTTP status. */
import { isMoeError } from '@moe/core'

/** The status logged if the client disconnected, as in nginx. It is never received by a client. */
export const CLIENT_GONE = 499

export interface ApiErrorDetails {
  /** The invalid field of the request, for example `messages[0].content`. */
  readonly param?: string
  /** A code for programs, for example OpenAI's `context_length_exceeded`. */
  readonly code?: string
  readonly cause?: unknown
}

/** An error that is reported to the client. */
export class ApiError extends Error {
  readonly status: number
  readonly param: string | null
  readonly code: string | null

  constructor(status: number, message: string, { param, code, cause }: ApiErrorDetails = {}) {
    super(message, cause === undefined ? undefined : { cause })
    this.name = 'ApiError'
    this.status = status
    this.param = param ?? null
    this.code = code ?? null
  }

  /** The response body, or the data of an event if the stream has already started. */
  toJSON() {
    const { message, status, param, code } = this
    return { error: { message, type: status >= 500 ? 'server_error' : 'invalid_request_error', param, code } }
  }
}

/** Converts any error to the one that the client receives; details of internal errors are only logged. */
export function toApiError(cause: unknown): ApiError {
  if (cause instanceof ApiError) return cause
  if (isMoeError(cause, 'E_ABORTED')) return new ApiError(CLIENT_GONE, 'the client disconnected', { cause })
  if (isMoeError(cause, 'E_ATTR')) return new ApiError(400, cause.message, { cause })
  if (isMoeError(cause, 'E_OUT_OF_MEMORY')) {
    const message = `${cause.message}; send a smaller request, or retry later`
    return new ApiError(503, message, { code: 'out_of_memory', cause })
  }
  if (isMoeError(cause, 'E_DISPOSED')) return new ApiError(503, 'the server is shutting down', { cause })
  return new ApiError(500, 'internal server error; see the log of the server', { code: 'internal_error', cause })
}
