/** @file Log-probabilities as OpenAI's two endpoints write them. */
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ToldToken } from './text-parts.ts'

/** Of a part of a completion: lists of a value for each token. */
export function completionLogProbs(tokens: readonly ToldToken[], tokenizer: BpeTokenizer): object {
  const named = (id: number) => tokenText(id, bytesOf(id, tokenizer), 'bytes:')
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
    const bytes = bytesOf(token, tokenizer)
    return { token: tokenText(token, bytes, ''), logprob: logProb, bytes: bytes && Array.from(bytes) }
  }
  const content = tokens.flatMap(({ likely, isEnd }) =>
    likely === null || isEnd ? [] : [{ ...entry(likely), top_logprobs: likely.top.map(entry) }],
  )
  return { content, refusal: null }
}

/** Null for an id that the model has beyond those of the tokenizer: vocabularies are filled up. */
function bytesOf(id: number, tokenizer: BpeTokenizer): Uint8Array | null {
  return tokenizer.idToToken(id) === undefined ? null : tokenizer.tokenBytes(id)
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** Where a token has parts of characters, its bytes in words: `\xf0\x9f`. */
function tokenText(id: number, bytes: Uint8Array | null, prefix: string): string {
  // As vLLM names tokens that are to have no text.
  if (bytes === null) return `token_id:${id}`
  try {
    return utf8.decode(bytes)
  } catch {
    const shown = (byte: number) =>
      byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : `\\x${byte.toString(16).padStart(2, '0')}`
    return prefix + Array.from(bytes, shown).join('')
  }
}
