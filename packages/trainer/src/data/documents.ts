/** @file Documents as they come from a caller. */
import { MoeError } from '@moe/core'

/** One text is iterable, too, by its characters: it would make as many documents. @throws MoeError E_DATA */
export function checkDocuments(op: string, documents: Iterable<string>): void {
  if (typeof documents === 'object' && documents !== null && Symbol.iterator in documents) return
  throw new MoeError({
    code: 'E_DATA',
    op,
    problem: `the documents are ${typeof documents === 'string' ? 'one text' : documents}`,
    fix: 'pass a list of texts: [text], or a generator of them',
  })
}

/** Bytes of a text in UTF-8, where each half of a pair that is alone has three. */
export function utf8Bytes(text: string): number {
  let bytes = 0
  for (let i = 0; i < text.length; i++) {
    const unit = text.charCodeAt(i)
    bytes += unit < 0x80 ? 1 : unit < 0x800 ? 2 : 3
    // A pair has four.
    if (unit >= 0xd800 && unit < 0xdc00 && text.charCodeAt(i + 1) >> 10 === 0xdc00 >> 10) {
      bytes++
      i++
    }
  }
  return bytes
}
