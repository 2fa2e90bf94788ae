/** @file Log-probabilities as OpenAI's two endpoints write them. */
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ToldToken } from './text-parts.ts'

/** Of a part of a completion: lists of a value for each token. */
export function completionLogProbs(tokens: readonly ToldToken[], tokenizer: BpeTokenizer): object {
  const named = (id: number) => tokenText(tokenizer.tokenBytes(id), 'bytes:')
  return {
    tokens: tokens.map(({ id }) => named(id)),
    token_logprobs: tokens.map(({ likely }) => likely?.logProb ?? null),
    // The token itself is among them, be it likely or not.
    top_logprobs: tokens.map(
      ({ likely }) =>
        likely && Object.fromEntries([...likely.top, likely].map(({ token, logProb }) => [named(token), logProb])),
    ),
    text_offset: tokens.map(({ offset }) => offset),
  }
}

/** Of a part of a message. */
export function chatLogProbs(tokens: readonly ToldToken[], tokenizer: BpeTokenizer): object {
  const entry = ({ token, logProb }: { readonly token: number; readonly logProb: number }) => {
    const bytes = tokenizer.tokenBytes(token)
    return { token: tokenText(bytes, ''), logprob: logProb, bytes: Array.from(bytes) }
  }
  const content = tokens.flatMap(({ likely, isEnd }) =>
    likely === null || isEnd ? [] : [{ ...entry(likely), top_logprobs: likely.top.map(entry) }],
  )
  return { content, refusal: null }
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** Where a token has parts of characters, its bytes in words: `\xf0\x9f`. */
function tokenText(bytes: Uint8Array, prefix: string): string {
  try {
    return utf8.decode(bytes)
  } catch {
    const shown = (byte: number) =>
      byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : `\\x${byte.toString(16).padStart(2, '0')}`
    return prefix + Array.from(bytes, shown).join('')
  }
}
