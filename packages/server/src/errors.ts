/** @file What clients are told when something cannot be: OpenAI's error object, whose status decides which class its libraries throw. */
import { isMoeError } from '@moe/core'

/** Status of a client that went away, as nginx logs it: nobody receives it. */
export const CLIENT_GONE = 499

export interface ApiErrorDetails {
  /** Field of the request that is at fault: `messages[0].content`. */
  readonly param?: string
  /** For programs, where OpenAI has one: `context_length_exceeded`. */
  readonly code?: string
  readonly cause?: unknown
}

/** A refusal in words. */
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

  /** The body of the response, and the data of an event in a stream that began well. */
  toJSON() {
    const { message, status, param, code } = this
    return { error: { message, type: status >= 500 ? 'server_error' : 'invalid_request_error', param, code } }
  }
}

/** What a failure is to a client. */
export function toApiError(cause: unknown): ApiError {
  if (cause instanceof ApiError) return cause
  if (isMoeError(cause, 'E_ABORTED')) return new ApiError(CLIENT_GONE, 'the client went away', { cause })
  if (isMoeError(cause, 'E_ATTR')) return new ApiError(400, cause.message, { cause })
  if (isMoeError(cause, 'E_OUT_OF_MEMORY')) {
    const message = `${cause.message}; ask for less at once, or again when others are done`
    return new ApiError(503, message, { code: 'out_of_memory', cause })
  }
  if (isMoeError(cause, 'E_DISPOSED')) return new ApiError(503, 'the server is shutting down', { cause })
  return new ApiError(500, 'the server failed; its log says more', { code: 'internal_error', cause })
}
