/** @file Identifies tokenizers. */
import { createHash } from 'node:crypto'
import type { TextTokenizer } from '../model.ts'

/** Digest of a tokenizer's tokenizer.json; undefined if it has none. */
export function tokenizerDigest(tokenizer: TextTokenizer): string | undefined {
  const content = tokenizer.toJSON?.()
  if (content === undefined) return undefined
  return createHash('sha256').update(JSON.stringify(content, inOrder)).digest('hex').slice(0, 16)
}

/** Sorts keys: a file that was loaded and one that will be saved may order them differently. */
const inOrder = (_: string, value: unknown) =>
  typeof value === 'object' && value !== null && !Array.isArray(value)
    ? Object.fromEntries(Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1)))
    : value
