/** @file The texts in the records of a file. */
import { MoeError, shown } from '@moe/core'

/** Consecutive documents of a file. */
export interface Texts {
  readonly texts: readonly string[]
  /** Position of the next document: a byte of the uncompressed file, or a row. */
  readonly next: number
  /** Bytes of the file read so far. */
  readonly bytesRead: number
}

/** The text of a record; empty if it is null or empty. */
export function textOf(path: string, record: unknown, field: string, where: () => string): readonly string[] {
  const value = (record as Record<string, unknown> | null)?.[field]
  if (typeof value === 'string') return value === '' ? [] : [value]
  if (value === null) return []
  const fields = typeof record === 'object' && record !== null ? Object.keys(record).join(', ') : shown(record)
  throw unreadable(
    path,
    `${where()} has ${value === undefined ? `no ${field}` : `a ${field} that is not a string`}; its fields are ${fields}`,
    'name the field that contains the text: --field NAME, { field }',
  )
}

export const unreadable = (path: string, problem: string, fix?: string, cause?: unknown) =>
  new MoeError({ code: 'E_DATA', op: 'tokenize', problem: `${path}: ${problem}`, fix, cause, details: { path } })
