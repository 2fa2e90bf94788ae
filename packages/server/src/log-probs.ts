/** @file Log-probabilities in the formats of OpenAI's API. */
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ScoredToken } from './text-parts.ts'

/** The format of completions: lists with one value per token. */
export function completionLogProbs(tokens: readonly ScoredToken[], tokenizer: BpeTokenizer): object {
  const named = (id: number) => tokenText(id, bytesOf(id, tokenizer), 'bytes:')
  return {
    tokens: tokens.map(({ id }) => named(id)),
    token_logprobs: tokens.map(({ score }) => score?.logProb ?? null),
    // Always includes the token itself.
    top_logprobs: tokens.map(
      ({ score }) =>
        score && Object.fromEntries([...score.top, score].map(({ token, logProb }) => [named(token), logProb])),
    ),
    text_offset: tokens.map(({ offset }) => offset),
  }
}

/** The format of chats: one object per token. */
export function chatLogProbs(tokens: readonly ScoredToken[], tokenizer: BpeTokenizer): object {
  const entry = ({ token, logProb }: { readonly token: number; readonly logProb: number }) => {
    const bytes = bytesOf(token, tokenizer)
    return { token: tokenText(token, bytes, ''), logprob: logProb, bytes: bytes && Array.from(bytes) }
  }
  const content = tokens.flatMap(({ score, isEnd }) =>
    score === null || isEnd ? [] : [{ ...entry(score), top_logprobs: score.top.map(entry) }],
  )
  return { content, refusal: null }
}

/** Null for ids that the tokenizer does not define: the model's vocabulary may be padded. */
function bytesOf(id: number, tokenizer: BpeTokenizer): Uint8Array | null {
  return tokenizer.idToToken(id) === undefined ? null : tokenizer.tokenBytes(id)
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** The text of a token; if it is not valid UTF-8 by itself, its escaped bytes, for example `\xf0\x9f`. */
function tokenText(id: number, bytes: Uint8Array | null, prefix: string): string {
  // vLLM's notation for tokens by id.
  if (bytes === null) return `token_id:${id}`
  try {
    return utf8.decode(bytes)
  } catch {
    const shown = (byte: number) =>
      byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : `\\x${byte.toString(16).padStart(2, '0')}`
    return prefix + Array.from(bytes, shown).join('')
  }
}
