/** @file Places of tokens in a text: from bytes to UTF-16 code units. */
import type { IdBuffer } from './bpe/encoder.ts'

export class OffsetCollector {
  /** Index in UTF-16 code units of the character that each byte belongs to, and of the end. */
  readonly #unitOf: Uint32Array
  readonly #offsets: number[] = []
  readonly #trim: boolean
  readonly #prefixSpace: boolean

  constructor(bytes: Uint8Array, trim: boolean, prefixSpace: boolean) {
    this.#trim = trim
    this.#prefixSpace = prefixSpace
    const unitOf = new Uint32Array(bytes.length + 1)
    let unit = -1
    let width = 1
    for (let i = 0; i < bytes.length; i++) {
      if ((bytes[i] & 0xc0) !== 0x80) {
        unit += width
        width = bytes[i] >= 0xf0 ? 2 : 1
        if (unit < 0) unit = 0
      }
      unitOf[i] = unit
    }
    unitOf[bytes.length] = bytes.length === 0 ? 0 : unit + width
    this.#unitOf = unitOf
  }

  /** A token that stands for no part of the text. */
  addEmpty(out: IdBuffer, id: number): void {
    out.push(id)
    this.#offsets.push(0, 0)
  }

  /** A token of the model over the bytes from `start` to `end`. */
  addToken(start: number, end: number, token: Uint8Array): void {
    let leading = 0
    let trailing = 0
    if (this.#trim) {
      while (leading < token.length && token[leading] === 0x20) leading++
      while (trailing < token.length && token[token.length - 1 - trailing] === 0x20) trailing++
    }
    this.#push(start, end, leading, trailing)
  }

  add(start: number, end: number): void {
    this.#push(start, end, 0, 0)
  }

  /** Leaves out spaces as Hugging Face does: not the one that `add_prefix_space` may have put at the start. */
  #push(start: number, end: number, leading: number, trailing: number): void {
    const unitOf = this.#unitOf
    let from = unitOf[start]
    // Up to the first byte of the next character.
    let stop = end
    while (stop < unitOf.length - 1 && stop > 0 && unitOf[stop] === unitOf[stop - 1]) stop++
    let to = unitOf[stop]
    if (leading > 0) {
      const kept = this.#prefixSpace && (this.#offsets.length === 0 || from === 0) ? 1 : 0
      from = Math.min(from + leading - kept, to)
    }
    if (trailing > 0 && to >= trailing) to = Math.max(to - trailing, from)
    this.#offsets.push(from, to)
  }

  finish(): Uint32Array {
    return Uint32Array.from(this.#offsets)
  }
}
