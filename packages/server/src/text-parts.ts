/** @file A text in parts: the prompt and what is generated, each part with the log-probabilities of its tokens. */
import type { Generation, TextTokenizer, TokenLogProb } from '@moe/deepseek'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ToolCall } from './tool-format.ts'

export interface Prompt {
  readonly ids: ArrayLike<number>
  /** Number of tokens at the start that the server added, such as the begin token. */
  readonly added: number
}

/** A token with its log-probabilities. */
export interface ScoredToken {
  readonly id: number
  /** Null for the first token of a prompt, which has no preceding context. */
  readonly score: TokenLogProb | null
  /** Position, in code points from the start of the prompt, of the character that the token belongs to or starts with. */
  readonly offset: number
  /** Whether it is the end token, which is not part of the text. */
  readonly isEnd: boolean
  /** What it belongs to, if not to the answer. */
  readonly of?: 'reasoning' | 'calls'
}

export interface TextPart {
  readonly text: string
  /** Reasoning before the text. */
  readonly reasoning?: string
  /** Null if log-probabilities were not requested. */
  readonly tokens: readonly ScoredToken[] | null
  /** Tool calls, after all text. */
  readonly calls?: readonly ToolCall[]
}

/** Decodes generated tokens as text. Special tokens are omitted, except for those that `visible` contains. */
export function visibleText(tokenizer: BpeTokenizer, visible: string): TextTokenizer {
  const hidden = new Set(
    tokenizer.addedTokens.flatMap(({ id, content, special }) => (special && !visible.includes(content) ? id : [])),
  )
  return {
    vocabSize: tokenizer.vocabSize,
    createDecodeStream() {
      const stream = tokenizer.createDecodeStream()
      return { push: id => (hidden.has(id) ? '' : stream.push(id)), end: () => stream.end() }
    },
  }
}

/**
 * The parts of a generated text, preceded by the prompt if `echo` is set. A token belongs to the part that contains the characters it completes.
 */
export async function* textParts(
  prompt: Prompt,
  generation: Generation<string>,
  tokenizer: BpeTokenizer,
  decoder: TextTokenizer,
  { echo, scored }: { readonly echo: boolean; readonly scored: boolean },
): AsyncGenerator<TextPart> {
  const { text: promptText, offsets } = echo || scored ? read(prompt, tokenizer) : { text: '', offsets: [] }
  const stream = decoder.createDecodeStream({ skipSpecialTokens: true })
  let offset = characters(promptText)
  let reported = 0
  const newTokens = (): ScoredToken[] | null => {
    if (!scored) return null
    const all: ScoredToken[] = []
    for (const score of generation.logProbs.slice(reported)) {
      const isEnd = reported++ >= generation.stats.tokens
      all.push({ id: score.token, score, offset, isEnd })
      if (!isEnd) offset += characters(stream.push(score.token))
    }
    return all
  }
  const promptPart = (): TextPart => {
    const scores = generation.promptLogProbs
    const tokens = offsets.map((offset, i) => ({ id: prompt.ids[i], score: scores[i] ?? null, offset, isEnd: false }))
    return { text: promptText, tokens: scored ? tokens : null }
  }
  let started = !echo
  for await (const text of generation) {
    if (!started) yield promptPart()
    started = true
    yield { text, tokens: newTokens() }
  }
  if (!started) yield promptPart()
  const rest = newTokens()
  if (rest?.length) yield { text: '', tokens: rest }
}

/** Decodes a prompt: its text, and the position of each token in it. */
function read({ ids, added }: Prompt, tokenizer: BpeTokenizer): { text: string; offsets: number[] } {
  const stream = tokenizer.createDecodeStream()
  let text = ''
  let offset = 0
  const offsets = Array.from(ids, (id, i) => {
    const at = offset
    const isText = i >= added && tokenizer.idToToken(id) !== undefined
    const completed = isText ? stream.push(id) : ''
    text += completed
    offset += characters(completed)
    return at
  })
  return { text: text + stream.end(), offsets }
}

function characters(text: string): number {
  let count = 0
  for (const _ of text) count++
  return count
}

/** Tokens that were collected, or null if there are none because they are not scored. */
export const orNull = (tokens: readonly ScoredToken[]): readonly ScoredToken[] | null =>
  tokens.length > 0 ? tokens : null

/** The length of the longest proper prefix of `of` that `text` ends with. */
export function partialMatch(text: string, of: string): number {
  for (let n = Math.min(of.length - 1, text.length); n > 0; n--) if (text.endsWith(of.slice(0, n))) return n
  return 0
}
