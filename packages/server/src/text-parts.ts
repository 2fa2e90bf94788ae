/** @file A text in parts, each with its tokens and what the model found likely in their places. */
import type { Generation, TokenLogProb } from '@moe/deepseek'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ToolCall } from './tool-calls.ts'
import type { Prompt } from './wanted-texts.ts'

export interface ToldToken {
  readonly id: number
  /** Null for the first of a prompt: nothing stands before it. */
  readonly likely: TokenLogProb | null
  /** Characters (code points) of prompt and text before the one that it is of, or begins with. */
  readonly offset: number
  /** Whether it is the end token, which is no part of the text. */
  readonly isEnd: boolean
}

export interface TextPart {
  readonly text: string
  /** What was thought before it. */
  readonly reasoning?: string
  /** Null where nobody asked. */
  readonly tokens: readonly ToldToken[] | null
  /** Calls of tools, behind all text. */
  readonly calls?: readonly ToolCall[]
}

/** What is made behind a prompt, with the prompt in front for `echo`. A token comes with the part that has what it completes. */
export async function* textParts(
  prompt: Prompt,
  made: Generation<string>,
  tokenizer: BpeTokenizer,
  { echo, isTold }: { readonly echo: boolean; readonly isTold: boolean },
): AsyncGenerator<TextPart> {
  const { text: before, offsets } = echo || isTold ? read(prompt, tokenizer) : { text: '', offsets: [] }
  const stream = tokenizer.createDecodeStream({ skipSpecialTokens: true })
  let offset = characters(before)
  let told = 0
  const untold = (): ToldToken[] | null => {
    if (!isTold) return null
    const all: ToldToken[] = []
    for (const likely of made.logProbs.slice(told)) {
      const isEnd = told++ >= made.stats.tokens
      all.push({ id: likely.token, likely, offset, isEnd })
      if (!isEnd) offset += characters(stream.push(likely.token))
    }
    return all
  }
  const ofPrompt = (): TextPart => {
    const likely = made.promptLogProbs
    const tokens = offsets.map((offset, i) => ({ id: prompt.ids[i], likely: likely[i] ?? null, offset, isEnd: false }))
    return { text: before, tokens: isTold ? tokens : null }
  }
  let isBegun = !echo
  for await (const text of made) {
    if (!isBegun) yield ofPrompt()
    isBegun = true
    yield { text, tokens: untold() }
  }
  if (!isBegun) yield ofPrompt()
  const rest = untold()
  if (rest?.length) yield { text: '', tokens: rest }
}

/** The text of a prompt as it was given, and where its tokens begin. */
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
