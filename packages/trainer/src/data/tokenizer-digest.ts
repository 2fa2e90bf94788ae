/** @file What tells one tokenizer from another. */
import { createHash } from 'node:crypto'
import type { TextTokenizer } from '../model.ts'

/** Identity of a tokenizer, by the content of its tokenizer.json; undefined where it has none. */
export function tokenizerDigest(tokenizer: TextTokenizer): string | undefined {
  const content = tokenizer.toJSON?.()
  if (content === undefined) return undefined
  return createHash('sha256').update(JSON.stringify(content, inOrder)).digest('hex').slice(0, 16)
}

/** A file that was read and one that is to be written may name the same things in another order. */
const inOrder = (_: string, value: unknown) =>
  typeof value === 'object' && value !== null && !Array.isArray(value)
    ? Object.fromEntries(Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1)))
    : value
