/** @file What a model thinks before it answers: `<think>` … `</think>`, which is told apart from the answer. */
import type { TextPart } from './text-parts.ts'
import { beginning } from './tool-calls.ts'

/** Whether the prompt has begun it, the model may begin it, or it is over. */
export type Thinking = 'begun' | 'perhaps' | 'over'

export const THINK = '<think>'
export const THOUGHT = '</think>'

/** Behind a prompt, by a template that knows of it or not. */
export function thinkingBehind(prompt: string, thinks: boolean): Thinking {
  const end = prompt.trimEnd()
  if (end.endsWith(THINK)) return 'begun'
  return thinks && !end.endsWith(THOUGHT) ? 'perhaps' : 'over'
}

/** The parts of a text, those of its reasoning as such. White space around it is left out. */
export async function* withReasoning(parts: AsyncIterable<TextPart>, thinking: Thinking): AsyncGenerator<TextPart> {
  let state: 'opening' | 'begun' | 'thinking' | 'behind' | 'answer' =
    thinking === 'perhaps' ? 'opening' : thinking === 'begun' ? 'begun' : 'answer'
  let held = ''
  for await (const part of parts) {
    held += part.text
    let reasoning = ''
    if (state === 'opening') {
      const text = held.trimStart()
      if (text.startsWith(THINK)) [held, state] = [text.slice(THINK.length), 'begun']
      else if (!THINK.startsWith(text)) state = 'answer'
    }
    if (state === 'begun') {
      held = held.trimStart()
      if (held !== '') state = 'thinking'
    }
    if (state === 'thinking') {
      const at = held.indexOf(THOUGHT)
      const known = at >= 0 ? held.slice(0, at).trimEnd() : held.slice(0, held.length - beginning(held, THOUGHT))
      reasoning = at >= 0 ? known : known.trimEnd()
      held = held.slice(at >= 0 ? at + THOUGHT.length : reasoning.length)
      if (at >= 0) state = 'behind'
    }
    if (state === 'behind') {
      held = held.trimStart()
      if (held !== '') state = 'answer'
    }
    const text = state === 'answer' ? held : ''
    held = held.slice(text.length)
    if (text !== '' || reasoning !== '' || part.tokens?.length)
      yield { ...part, text, ...(reasoning !== '' && { reasoning }) }
  }
  const rest = held.trimEnd()
  if (state === 'thinking' && rest !== '') yield { text: '', tokens: null, reasoning: rest }
  else if (state === 'opening' && held !== '') yield { text: held, tokens: null }
}
