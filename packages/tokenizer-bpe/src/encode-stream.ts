/** @file Splits a text that arrives in parts at positions where pieces end, whatever follows. */
import type { AddedToken } from './added-tokens.ts'
import { TokenizerError } from './errors.ts'

const refused = (given: unknown, wanted: string, fix: string) =>
  new TokenizerError({ code: 'E_DATA', op: 'encodeStream', problem: `expected ${wanted}, got ${typeof given}`, fix })

/**
 * Yields parts of a text that can be encoded independently: each ends before a space between two letters.
 * @param added tokens that no part may split. If omitted, because the pre-tokenizer has no scanner, the text is yielded whole.
 * @throws TokenizerError E_DATA if the parts are not strings; bytes could be split within characters
 */
export async function* cutStream(
  parts: AsyncIterable<string> | Iterable<string>,
  added: readonly AddedToken[] | undefined,
): AsyncGenerator<string> {
  const source = Object(parts)
  if (!(Symbol.asyncIterator in source || Symbol.iterator in source))
    throw refused(parts, 'texts', 'pass a list or a stream of texts')
  const cuttable = added?.every(
    token => !token.lstrip && !token.rstrip && !token.single_word && !/[A-Za-z] [A-Za-z]/.test(token.content),
  )
  const margin = (added ?? []).reduce((most, token) => Math.max(most, token.content.length), 0) + 2
  let held = ''
  /** Length from which buffered text is searched again: an eighth longer than without result. */
  let worthLooking = 0
  for await (const part of parts) {
    if (typeof part !== 'string') {
      throw refused(part, 'text', "read files with { encoding: 'utf8' }, and other bytes through a TextDecoderStream")
    }
    held += part
    if (!cuttable || held.length < worthLooking) continue
    let cut = held.length - margin
    while (cut > 0 && !(held[cut] === ' ' && isAsciiLetter(held, cut - 1) && isAsciiLetter(held, cut + 1))) cut--
    if (cut <= 0) {
      worthLooking = held.length + (held.length >> 3)
      continue
    }
    worthLooking = 0
    yield held.slice(0, cut)
    held = held.slice(cut)
  }
  if (held !== '') yield held
}

function isAsciiLetter(text: string, at: number): boolean {
  const lower = text.charCodeAt(at) | 0x20
  return lower >= 0x61 && lower <= 0x7a
}
