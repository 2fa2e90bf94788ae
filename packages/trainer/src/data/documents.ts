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
