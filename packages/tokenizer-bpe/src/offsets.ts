/** @file Positions of tokens in a text: converts bytes to UTF-16 code units. */
import type { IdBuffer, PieceListener } from './bpe/encoder.ts'
import type { BpeModel } from './model.ts'
import { previous } from './unicode/utf8.ts'

/** White space, as itself or in the byte alphabet. */
const WHITE_SPACE = /[Ġ\p{White_Space}]/u

/** Whether a byte continues a character. */
const isInside = (byte: number) => (byte & 0xc0) === 0x80

export class OffsetCollector {
  readonly #text: string
  readonly #bytes: Uint8Array
  /** For each byte and for the end, the index of its character in UTF-16 code units. */
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
   * Adds the position of a token at the bytes from `start` to `end`; 0 and 0 if it covers no text. White space at its
   * ends is excluded as in Hugging Face, except for the space that `add_prefix_space` may have added at the start.
   * @param token the token in the byte alphabet; omit it for an added token, which is the covered text itself
   */
  add(start: number, end: number, token?: string): void {
    const bytes = this.#bytes
    const unitOf = this.#unitOf
    let from = start
    let to = end
    // Extend to whole characters.
    while (isInside(bytes[from])) from--
    while (isInside(bytes[to])) to++
    if (this.#trim) {
      const name = token ?? this.#text.slice(unitOf[from], unitOf[to])
      let leading = 0
      let trailing = 0
      while (leading < name.length && WHITE_SPACE.test(name[leading])) leading++
      while (trailing < name.length && WHITE_SPACE.test(name[name.length - 1 - trailing])) trailing++
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
   * Adds the positions of the tokens of pieces, which are the last ones in `out`.
   * @param bytes the bytes that the pieces come from
   * @param origin position of each byte in the text, if the pre-tokenizer changed the bytes
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
          // The unknown token, or each part of a fused one, covers bytes without a token, regardless of its own length.
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
