/** @file Separates the reasoning of a model, `<think>` … `</think>`, from its answer. */
import { orNull, partialMatch, type ScoredToken, type TextPart } from './text-parts.ts'

/** Whether a generated text starts inside reasoning that the prompt opened, may open it itself, or contains none. */
export type Thinking = 'open' | 'optional' | 'none'

export const THINK_START = '<think>'
export const THINK_END = '</think>'

/**
 * How a text after this prompt can start.
 * @param hasReasoning whether the template mentions reasoning
 */
export function thinkingAfter(prompt: string, hasReasoning: boolean): Thinking {
  const end = prompt.trimEnd()
  if (end.endsWith(THINK_START)) return 'open'
  return hasReasoning && !end.endsWith(THINK_END) ? 'optional' : 'none'
}

/** Moves reasoning in the parts of a text to their `reasoning`. White space around it is removed. */
export async function* withReasoning(parts: AsyncIterable<TextPart>, thinking: Thinking): AsyncGenerator<TextPart> {
  let state: 'start' | 'opened' | 'thinking' | 'closed' | 'answer' =
    thinking === 'optional' ? 'start' : thinking === 'open' ? 'opened' : 'answer'
  let held = ''
  /** Tokens of which it is not known yet what they belong to. */
  let waiting: ScoredToken[] = []
  for await (const part of parts) {
    held += part.text
    waiting.push(...(part.tokens ?? []))
    let reasoning = ''
    if (state === 'start') {
      const text = held.trimStart()
      if (text.startsWith(THINK_START)) [held, state] = [text.slice(THINK_START.length), 'opened']
      else if (!THINK_START.startsWith(text)) state = 'answer'
    }
    if (state === 'opened') {
      held = held.trimStart()
      if (held !== '') state = 'thinking'
    }
    if (state === 'thinking') {
      const at = held.indexOf(THINK_END)
      reasoning = held.slice(0, at >= 0 ? at : held.length - partialMatch(held, THINK_END)).trimEnd()
      held = held.slice(at >= 0 ? at + THINK_END.length : reasoning.length)
      if (at >= 0) state = 'closed'
    }
    if (state === 'closed') {
      held = held.trimStart()
      if (held !== '') state = 'answer'
    }
    if (state === 'start') continue
    const text = state === 'answer' ? held : ''
    held = held.slice(text.length)
    const tokens =
      part.tokens && waiting.map(token => (state === 'answer' ? token : { ...token, of: 'reasoning' as const }))
    waiting = []
    if (text !== '' || reasoning !== '' || tokens?.length)
      yield { ...part, text, tokens, ...(reasoning !== '' && { reasoning }) }
  }
  const rest = held.trimEnd()
  if (state === 'thinking' && rest !== '') yield { text: '', tokens: null, reasoning: rest }
  else if (state === 'start' && (held !== '' || waiting.length > 0)) yield { text: held, tokens: orNull(waiting) }
}
