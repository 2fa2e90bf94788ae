/** @file Checks and measures documents. */
import { MoeError } from '@moe/core'

/** A single string is iterable too: its characters would become documents. @throws MoeError E_DATA */
export function checkDocuments(op: string, documents: Iterable<string>): void {
  if (typeof documents === 'object' && documents !== null && Symbol.iterator in documents) return
  throw new MoeError({
    code: 'E_DATA',
    op,
    problem: `documents is ${typeof documents === 'string' ? 'a single string' : documents}`,
    fix: 'pass a list or generator of strings, such as [text]',
  })
}

/** Length of a text in UTF-8 bytes. An unpaired surrogate counts three. */
export function utf8Bytes(text: string): number {
  let bytes = 0
  for (let i = 0; i < text.length; i++) {
    const unit = text.charCodeAt(i)
    bytes += unit < 0x80 ? 1 : unit < 0x800 ? 2 : 3
    // A surrogate pair has four bytes.
    if (unit >= 0xd800 && unit < 0xdc00 && text.charCodeAt(i + 1) >> 10 === 0xdc00 >> 10) {
      bytes++
      i++
    }
  }
  return bytes
}
