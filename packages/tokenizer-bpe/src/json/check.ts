/** @file Reading untrusted JSON: every access names where it is and what it found. */
import { TokenizerError } from '../errors.ts'

export type JsonObject = Readonly<Record<string, unknown>>

export function describe(value: unknown): string {
  if (value === null) return 'null'
  if (Array.isArray(value)) return `an array of ${value.length}`
  if (typeof value === 'string') return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}…` : value)
  if (typeof value === 'object') return 'an object'
  return String(value)
}

export function wrong(where: string, problem: string, details?: Record<string, unknown>): TokenizerError {
  return new TokenizerError({
    code: 'E_FORMAT',
    op: `tokenizer.json ${where}`,
    problem,
    fix: 'the file is damaged or not of this format',
    details,
  })
}

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
    throw wrong(where, `expected an object, got ${describe(value)}`)
  }
  return value as JsonObject
}

export function asArray(value: unknown, where: string): readonly unknown[] {
  if (!Array.isArray(value)) throw wrong(where, `expected an array, got ${describe(value)}`)
  return value
}

export function asString(value: unknown, where: string): string {
  if (typeof value !== 'string') throw wrong(where, `expected a string, got ${describe(value)}`)
  return value
}

/** A boolean that may be absent. */
export function asFlag(value: unknown, where: string, absent: boolean): boolean {
  if (value === undefined || value === null) return absent
  if (typeof value !== 'boolean') throw wrong(where, `expected true or false, got ${describe(value)}`)
  return value
}

export function asId(value: unknown, where: string, limit: number): number {
  if (typeof value !== 'number' || !Number.isInteger(value) || value < 0 || value >= limit) {
    throw wrong(where, `expected an id from 0 to ${limit - 1}, got ${describe(value)}`)
  }
  return value
}
