/** @file Splits a text that arrives in parts at positions where pieces end regardless of what follows. */
import type { AddedToken } from './added-tokens.ts'
import { TokenizerError } from './errors.ts'

const invalidInput = (given: unknown, expected: string, fix: string) =>
  new TokenizerError({ code: 'E_DATA', op: 'encodeStream', problem: `expected ${expected}, got ${typeof given}`, fix })

/**
 * Yields parts of a text that can be encoded independently: each ends before a space between two ASCII letters.
 * @param added tokens that must not be split; omit them if the pre-tokenizer has no scanner, to yield the text as a
 * whole
 * @throws TokenizerError E_DATA if the parts are not strings, for example bytes, which may end within a character
 */
export async function* splitStream(
  parts: AsyncIterable<string> | Iterable<string>,
  added: readonly AddedToken[] | undefined,
): AsyncGenerator<string> {
  const source = Object(parts)
  if (!(Symbol.asyncIterator in source || Symbol.iterator in source))
    throw invalidInput(parts, 'texts', 'pass a list or a stream of texts')
  const canSplit = added?.every(
    token => !token.lstrip && !token.rstrip && !token.single_word && !/[A-Za-z] [A-Za-z]/.test(token.content),
  )
  const margin = (added ?? []).reduce((most, token) => Math.max(most, token.content.length), 0) + 2
  let buffered = ''
  /**
   * Minimum length of the buffered text for the next search: an eighth more than in a search that found no position.
   */
  let searchFrom = 0
  for await (const part of parts) {
    if (typeof part !== 'string') {
      throw invalidInput(
        part,
        'text',
        "read files with { encoding: 'utf8' }, and other bytes through a TextDecoderStream",
      )
    }
    buffered += part
    if (!canSplit || buffered.length < searchFrom) continue
    let cut = buffered.length - margin
    while (cut > 0 && !(buffered[cut] === ' ' && isAsciiLetter(buffered, cut - 1) && isAsciiLetter(buffered, cut + 1)))
      cut--
    if (cut <= 0) {
      searchFrom = buffered.length + (buffered.length >> 3)
      continue
    }
    searchFrom = 0
    yield buffered.slice(0, cut)
    buffered = buffered.slice(cut)
  }
  if (buffered !== '') yield buffered
}

function isAsciiLetter(text: string, at: number): boolean {
  const lower = text.charCodeAt(at) | 0x20
  return lower >= 0x61 && lower <= 0x7a
}
