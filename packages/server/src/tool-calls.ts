/** @file Extracts the tool calls from a generated text. */
import { orNull, partialMatch, type ScoredToken, type TextPart } from './text-parts.ts'
import type { ToolCall } from './tool-format.ts'

/** How to extract the calls from a text. */
export interface CallReader {
  /** Marks the start of the calls. Text after it is withheld until the whole text has been generated. */
  readonly begin: string
  /** Whether calls can only be at the start of the text. */
  readonly onlyAtStart: boolean
  read(text: string): ToolCall[]
}

/** Passes the parts of a text on and replaces its calls by a last part with `calls`. If no call can be parsed, the text is passed on unchanged. */
export async function* withCalls(
  parts: AsyncIterable<TextPart>,
  { begin, onlyAtStart, read }: CallReader,
): AsyncGenerator<TextPart> {
  let held = ''
  /** The tokens of the text that is held. */
  const waiting: ScoredToken[] = []
  let isBegun = false
  let isOver = false
  for await (const part of parts) {
    held += part.text
    waiting.push(...(part.tokens ?? []))
    isOver ||= onlyAtStart && !isBegun && held !== '' && !held.startsWith(begin) && !begin.startsWith(held)
    const at: number = isBegun ? 0 : isOver ? -1 : held.indexOf(begin)
    const safe = at >= 0 ? at : isOver ? held.length : held.length - partialMatch(held, begin)
    isBegun ||= at >= 0
    const known = safe > 0 || held === '' ? waiting.splice(0) : []
    if (safe > 0 || known.length > 0 || part.reasoning)
      yield { ...part, text: held.slice(0, safe), tokens: part.tokens && known }
    held = held.slice(safe)
  }
  const calls = isBegun ? read(held) : []
  const tokens = waiting.map(token => (calls.length > 0 ? { ...token, of: 'calls' as const } : token))
  if (calls.length > 0) yield { text: '', tokens: orNull(tokens), calls }
  else if (held !== '') yield { text: held, tokens: orNull(tokens) }
}
