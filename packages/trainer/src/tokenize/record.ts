/** @file What the records of a file come to. */
import { MoeError, shown } from '@moe/core'

/** Some documents of a file. */
export interface Texts {
  readonly texts: readonly string[]
  /** Where the next document begins: a byte of what was compressed, or a row. */
  readonly next: number
  /** Bytes of the file read so far. */
  readonly bytesRead: number
}

/** The text of a record; none where it is null or empty. */
export function textOf(path: string, record: unknown, field: string, where: () => string): readonly string[] {
  const value = (record as Record<string, unknown> | null)?.[field]
  if (typeof value === 'string') return value === '' ? [] : [value]
  if (value === null) return []
  const fields = typeof record === 'object' && record !== null ? Object.keys(record).join(', ') : shown(record)
  throw unreadable(
    path,
    `${where()} has ${value === undefined ? `no ${field}` : `a ${field} that is no text`}, but ${fields}`,
    'say which field holds the text: --field NAME, { field }',
  )
}

export const unreadable = (path: string, problem: string, fix?: string, cause?: unknown) =>
  new MoeError({ code: 'E_DATA', op: 'tokenize', problem: `${path}: ${problem}`, fix, cause, details: { path } })
