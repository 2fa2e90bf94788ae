/** @file What tells one tokenizer from another. */
import { createHash } from 'node:crypto'
import type { TextTokenizer } from '../model.ts'

/** Identity of a tokenizer, by the content of its tokenizer.json; undefined where it has none. */
export function tokenizerDigest(tokenizer: TextTokenizer): string | undefined {
  const content = tokenizer.toJSON?.()
  if (content === undefined) return undefined
  return createHash('sha256').update(JSON.stringify(content)).digest('hex').slice(0, 16)
}
