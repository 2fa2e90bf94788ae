/** @file The text of generated ids, up to a stop string. */

/** What `generate` needs from a tokenizer to yield text: a decoder that never splits a character. */
export interface TextTokenizer {
  /** Creates a decoder that takes ids one at a time and returns complete characters; `end` returns the rest. Called with `skipSpecialTokens`. */
  createDecodeStream(options?: { skipSpecialTokens?: boolean }): { push(id: number): string; end(): string }
  /** Number of ids that have text. Higher ids, which models with a padded vocabulary have, are never generated. Default: all ids. */
  readonly vocabSize?: number
}

/** Yields the text of ids as they are generated, up to the first stop string; then `onStop` is called. Text that may be the beginning of a stop string is held back. */
export async function* decodedText(
  ids: AsyncIterable<number>,
  tokenizer: TextTokenizer,
  stops: readonly string[],
  onStop: () => void,
): AsyncGenerator<string> {
  const stream = tokenizer.createDecodeStream({ skipSpecialTokens: true })
  let held = ''
  for await (const id of ids) {
    held += stream.push(id)
    const end = firstStop(held, stops)
    if (end >= 0) {
      onStop()
      if (end > 0) yield held.slice(0, end)
      return
    }
    const safe = held.length - unfinished(held, stops)
    if (safe > 0) yield held.slice(0, safe)
    held = held.slice(safe)
  }
  held += stream.end()
  const end = firstStop(held, stops)
  if (end >= 0) onStop()
  const rest = end < 0 ? held : held.slice(0, end)
  if (rest !== '') yield rest
}

/** Where the earliest stop string begins, or -1. */
function firstStop(text: string, stops: readonly string[]): number {
  const found = stops.map(stop => text.indexOf(stop)).filter(at => at >= 0)
  return found.length === 0 ? -1 : Math.min(...found)
}

/** Length of the longest end of the text that may become a stop string. */
function unfinished(text: string, stops: readonly string[]): number {
  let longest = 0
  for (const stop of stops) {
    for (let n = Math.min(stop.length - 1, text.length); n > longest; n--) {
      if (text.endsWith(stop.slice(0, n))) longest = n
    }
  }
  return longest
}
