/** @file Decodes ids as they arrive, one complete character at a time. */
import { validation } from './validation.ts'

/** Returns the bytes of a token; empty for one that is omitted. */
export type TokenBytes = (id: number) => Uint8Array

/** Decodes ids one at a time. Returned text never ends within a character; an incomplete one is buffered. */
export class DecodeStream {
  readonly #bytesOf: TokenBytes
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true })

  constructor(bytesOf: TokenBytes) {
    this.#bytesOf = bytesOf
  }

  /** Adds ids and returns the text that they complete; empty within a character. */
  push(ids: number | Iterable<number>): string {
    if (typeof ids === 'number') return this.#decoder.decode(this.#bytesOf(ids), { stream: true })
    validation.check?.('decode', {}, ids)
    let text = ''
    for (const id of ids) text += this.#decoder.decode(this.#bytesOf(id), { stream: true })
    return text
  }

  /**
   * Returns the remaining text: empty, or U+FFFD if the ids ended within a character. The stream can then be reused.
   */
  end(): string {
    return this.#decoder.decode()
  }
}
