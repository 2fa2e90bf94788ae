/** @file Formats a request as a log line. */
import type { RequestRecord } from './request-record.ts'

const paint = (code: number, text: string) => `\x1b[${code}m${text}\x1b[0m`

/** Formats a request for people: `POST /v1/completions 200 0.31 s, 4 + 16 tokens, length`. */
export function requestLine(record: RequestRecord, color: boolean): string {
  const { method, path, status, seconds, promptTokens, generatedTokens = 0, finishReasons = [], error } = record
  const painted = color ? paint(status < 400 ? 32 : status < 500 ? 33 : 31, `${status}`) : status
  const tokens = promptTokens === undefined ? [] : [`${promptTokens} + ${generatedTokens} tokens`]
  const ends = [...new Set(finishReasons)]
  const problem = error === undefined ? [] : [shown(error, status)]
  return [`${method} ${printable(path)} ${painted} ${seconds.toFixed(2)} s`, ...tokens, ...ends, ...problem].join(', ')
}

/** Formats a request as a JSON object. */
export function requestJson({ error, ...record }: RequestRecord): string {
  const errorField = error === undefined ? {} : { error: error instanceof Error ? error.message : String(error) }
  return JSON.stringify({ event: 'request', time: new Date().toISOString(), ...record, ...errorField })
}

/** Server errors are logged with their stack; for rejected requests, the message suffices. */
function shown(error: unknown, status: number): string {
  if (!(error instanceof Error)) return String(error)
  return status >= 500 ? (error.stack ?? error.message) : printable(error.message)
}

/** Removes control characters, so that text from clients cannot control the terminal. */
const printable = (text: string): string =>
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are the characters to remove
  text.replace(/[\x00-\x1f\x7f-\x9f]/g, ' ').slice(0, 300)
