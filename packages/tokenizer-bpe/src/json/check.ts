/** @file Checked access to untrusted JSON. Errors name the position in the file and the value. */
import { TokenizerError } from '../errors.ts'

export type JsonObject = Readonly<Record<string, unknown>>

/** Returns a short description of a value for messages. */
export function describe(value: unknown): string {
  if (value === null) return 'null'
  if (Array.isArray(value)) return `an array of ${value.length}`
  if (typeof value === 'string') return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}…` : value)
  if (typeof value === 'object') return 'an object'
  return String(value)
}

/** Returns an error for an invalid value. */
export function invalid(where: string, problem: string, details?: Record<string, unknown>): TokenizerError {
  return new TokenizerError({
    code: 'E_FORMAT',
    op: `tokenizer.json ${where}`,
    problem,
    fix: 'the file is corrupt or has another format',
    details,
  })
}

/** Returns an error for a feature that this package does not support. */
export function unsupported(where: string, what: string, fix = 'convert the file'): TokenizerError {
  return new TokenizerError({
    code: 'E_UNSUPPORTED',
    op: `tokenizer.json ${where}`,
    problem: `${what} is not supported`,
    fix,
  })
}

export function asObject(value: unknown, where: string): JsonObject {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw invalid(where, `expected an object, got ${describe(value)}`)
  }
  return value as JsonObject
}

export function asArray(value: unknown, where: string): readonly unknown[] {
  if (!Array.isArray(value)) throw invalid(where, `expected an array, got ${describe(value)}`)
  return value
}

export function asString(value: unknown, where: string): string {
  if (typeof value !== 'string') throw invalid(where, `expected a string, got ${describe(value)}`)
  return value
}

/** Returns a boolean, or `fallback` if it is missing or null. */
export function asFlag(value: unknown, where: string, fallback: boolean): boolean {
  if (value === undefined || value === null) return fallback
  if (typeof value !== 'boolean') throw invalid(where, `expected true or false, got ${describe(value)}`)
  return value
}

/** Returns an id below `limit`. */
export function asId(value: unknown, where: string, limit: number): number {
  if (typeof value !== 'number' || !Number.isInteger(value) || value < 0 || value >= limit) {
    throw invalid(where, `expected an id from 0 to ${limit - 1}, got ${describe(value)}`)
  }
  return value
}
