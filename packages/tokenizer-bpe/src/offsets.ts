/** @file Places of tokens in a text: from bytes to UTF-16 code units. */
import type { IdBuffer, PieceListener } from './bpe/encoder.ts'
import type { BpeModel } from './model.ts'
import { previous } from './unicode/utf8.ts'

/** White space, spelled in the byte alphabet or not. */
const GAP = /[Ġ\p{White_Space}]/u

const isInside = (byte: number) => (byte & 0xc0) === 0x80

export class OffsetCollector {
  readonly #text: string
  readonly #bytes: Uint8Array
  /** Index in UTF-16 code units of the character that each byte belongs to, and of the end. */
  readonly #unitOf: Uint32Array
  readonly #offsets: number[] = []
  readonly #trim: boolean
  readonly #prefixSpace: boolean

  constructor(text: string, trim: boolean, prefixSpace: boolean) {
    this.#text = text
    this.#trim = trim
    this.#prefixSpace = prefixSpace
    const bytes = new TextEncoder().encode(text)
    const unitOf = new Uint32Array(bytes.length + 1)
    let unit = 0
    let width = 0
    for (let i = 0; i < bytes.length; i++) {
      if (!isInside(bytes[i])) {
        unit += width
        width = bytes[i] >= 0xf0 ? 2 : 1
      }
      unitOf[i] = unit
    }
    unitOf[bytes.length] = unit + width
    this.#bytes = bytes
    this.#unitOf = unitOf
  }

  /**
   * A token over the bytes from `start` to `end` of the text; 0 and 0 when it stands for no part of it. White space at its ends is left out as
   * Hugging Face does: not the one space that `add_prefix_space` may have put at the start.
   * @param token its spelling; an added token's is the text itself, with the white space that it took
   */
  add(start: number, end: number, token?: string): void {
    const bytes = this.#bytes
    const unitOf = this.#unitOf
    let from = start
    let to = end
    // To the borders of characters.
    while (isInside(bytes[from])) from--
    while (isInside(bytes[to])) to++
    if (this.#trim) {
      const name = token ?? this.#text.slice(unitOf[from], unitOf[to])
      let leading = 0
      let trailing = 0
      while (leading < name.length && GAP.test(name[leading])) leading++
      while (trailing < name.length && GAP.test(name[name.length - 1 - trailing])) trailing++
      if (leading === 1 && this.#prefixSpace && (this.#offsets.length === 0 || from === 0)) leading = 0
      for (; leading > 0 && from < to; leading--) {
        from++
        while (isInside(bytes[from])) from++
      }
      if (trailing <= unitOf[to]) for (; trailing > 0 && from < to; trailing--) to = previous(bytes, to)
    }
    this.#offsets.push(unitOf[from], unitOf[to])
  }

  /**
   * Adds the tokens of pieces, which are the last in `out`.
   * @param bytes what the pieces are cut from
   * @param origin place in the text of each of them, where they differ
   */
  pieces(
    { tokens, lengths, byteToken, options }: BpeModel,
    out: IdBuffer,
    bytes: Uint8Array,
    origin?: Int32Array,
  ): PieceListener {
    return (start, stop, count) => {
      let at = start
      for (let i = out.length - count; i < out.length; i++) {
        const id = out.ids[i]
        let next = at
        for (let rest = lengths[id]; rest > 0; ) {
          const isUnknown = byteToken[bytes[next++]] < 0 && options.unknown >= 0
          // The unknown token, or that part of a merged one, stands for bytes without a token, however long it is itself.
          while (isUnknown && options.fuseUnknown && byteToken[bytes[next]] < 0) next++
          rest -= isUnknown ? lengths[options.unknown] : 1
        }
        next = Math.min(stop, next)
        this.add(origin ? origin[at] : at, origin ? origin[next - 1] + 1 : next, tokens[id])
        at = next
      }
    }
  }

  finish(): Uint32Array {
    return Uint32Array.from(this.#offsets)
  }
}
