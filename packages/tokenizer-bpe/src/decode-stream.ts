/** @file Decoding ids as they arrive, a whole character at a time. */
import { callCheck } from './call-check.ts'

/** Gives the bytes of a token; empty for one that is left out. */
export type TokenBytes = (id: number) => Uint8Array

/** Decodes ids one by one. What it returns never ends inside a UTF-8 sequence: the start of one waits for the rest. */
export class DecodeStream {
  readonly #bytesOf: TokenBytes
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true })

  constructor(bytesOf: TokenBytes) {
    this.#bytesOf = bytesOf
  }

  /** The text that these ids complete; empty when they end inside a character. */
  push(ids: number | Iterable<number>): string {
    if (typeof ids === 'number') return this.#decoder.decode(this.#bytesOf(ids), { stream: true })
    callCheck.of?.('decode', {}, ids)
    let text = ''
    for (const id of ids) text += this.#decoder.decode(this.#bytesOf(id), { stream: true })
    return text
  }

  /** What is left: empty, or U+FFFD where the ids ended inside a character. The stream can then be used again. */
  end(): string {
    return this.#decoder.decode()
  }
}
