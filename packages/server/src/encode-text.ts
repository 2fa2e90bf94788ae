/** @file Encodes the texts of requests. */
import type { BpeTokenizer } from '@moe/tokenizer-bpe'

/** Number of characters from which a text is encoded on a worker thread, since that may take seconds, during which other requests must continue. */
const LONG_TEXT = 2 ** 17

type Options = NonNullable<Parameters<BpeTokenizer['encode']>[1]>

/** Encodes a text like `tokenizer.encode`. Long ones are encoded on a worker thread if one can be started. */
export async function encodeText(tokenizer: BpeTokenizer, text: string, options: Options = {}): Promise<Uint32Array> {
  if (text.length < LONG_TEXT) return tokenizer.encode(text, options)
  // With fewer than two threads, the calling thread is used.
  const [ids] = await tokenizer.encodeBatch([text], { ...options, threads: 2 })
  return ids
}
