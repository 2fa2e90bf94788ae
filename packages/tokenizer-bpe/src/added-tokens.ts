/** @file Added tokens: the strings that are cut out of a text before it is pre-tokenized, with the flags of tokenizer.json. */
import { classOf, isSpace, LETTER, MARK } from './unicode/classes.ts'
import { codePointAt, previous, widthOf } from './unicode/utf8.ts'

/** One added token, in the spelling of tokenizer.json. */
export interface AddedToken {
  /** Below `vocabSize`. */
  readonly id: number
  /** The text that it stands for, exactly. */
  readonly content: string
  /** Left out by `decode` with `skipSpecialTokens`. */
  readonly special: boolean
  /** Looked for after the normalizer (and normalized itself), not before it. */
  readonly normalized: boolean
  /** Takes the white space on its left. */
  readonly lstrip: boolean
  /** Takes the white space on its right. */
  readonly rstrip: boolean
  /** Only where no word character touches it. */
  readonly single_word: boolean
}

/** Tells the number of the longest token that starts at a place of `bytes[..end)`, or -1. Places are asked for in rising order. */
export type TokenStarts = (bytes: Uint8Array, end: number) => (place: number) => number

/** What looks for long tokens in place of the trie, which at worst takes a step for each byte of a token at every place: long-tokens.ts, which browsers do without. */
export const longTokens: { find?: (contents: readonly Uint8Array[]) => TokenStarts | undefined } = {}

/** Which added tokens stay text where they are written out: 0 none, 1 the special ones, 2 all. */
export type Left = 0 | 1 | 2

/** Finds added tokens in bytes: leftmost, of those the longest. */
export class AddedTokenFinder {
  readonly #contents: Uint8Array[] = []
  readonly #tokens: AddedToken[] = []
  readonly #starts: TokenStarts | undefined
  /** Edges of the trie: `node * 256 + byte` to node. */
  readonly #edges = new Map<number, number>()
  readonly #tokenAt = [-1]
  readonly #firstBytes = new Uint8Array(256)
  /** The first byte of every token when they share one, as `<` of most; else -1. */
  #onlyFirst = -1

  /** @param contentOf bytes to look for, for each token */
  constructor(tokens: readonly AddedToken[], contentOf: (token: AddedToken) => Uint8Array) {
    const first = new Set<number>()
    for (const token of tokens) {
      const content = contentOf(token)
      if (content.length === 0) continue
      this.#contents.push(content)
      let node = 0
      for (const byte of content) {
        const key = node * 256 + byte
        if (!this.#edges.has(key)) this.#edges.set(key, this.#tokenAt.push(-1) - 1)
        node = this.#edges.get(key)!
      }
      this.#tokenAt[node] = this.#tokens.push(token) - 1
      this.#firstBytes[content[0]] = 1
      first.add(content[0])
    }
    this.#starts = longTokens.find?.(this.#contents)
    if (first.size === 1) [this.#onlyFirst] = first
  }

  /**
   * Cuts `bytes[start..end)` at added tokens: calls `text` for what lies between and `token` for each, in order.
   * @param left what stays in the text: no token, the special ones, or all
   */
  split(
    bytes: Uint8Array,
    start: number,
    end: number,
    left: Left,
    text: (start: number, end: number) => void,
    token: (token: AddedToken, start: number, end: number) => void,
  ): void {
    const starts = this.#starts?.(bytes, end)
    let done = start
    let at = this.#tokens.length === 0 ? end : start
    while (at < end) {
      at = this.#candidate(bytes, at, end)
      if (at >= end) break
      const found = starts ? starts(at) : this.#longest(bytes, at, end)
      if (found < 0) {
        at++
        continue
      }
      const match = this.#tokens[found]
      let from = at
      let to = at + this.#contents[found].length
      at = to
      if (left > (match.special ? 0 : 1)) continue
      if (match.single_word) {
        const touchesLeft = from > start && isWord(codePointAt(bytes, previous(bytes, from)))
        const touchesRight = to < end && isWord(codePointAt(bytes, to))
        if (touchesLeft || touchesRight) continue
      }
      if (match.lstrip) {
        while (from > done) {
          const before = previous(bytes, from)
          if (!isSpace(codePointAt(bytes, before))) break
          from = before
        }
        // Of what the token before took by `rstrip`, nothing is left to take.
        from = Math.max(from, done)
        if (from >= to) continue
      }
      if (match.rstrip) while (to < end && isSpace(codePointAt(bytes, to))) to += widthOf(bytes[to])
      if (done < from) text(done, from)
      token(match, from, to)
      done = to
    }
    if (done < end) text(done, end)
  }

  #candidate(bytes: Uint8Array, at: number, end: number): number {
    if (this.#onlyFirst >= 0) {
      const found = bytes.indexOf(this.#onlyFirst, at)
      return found < 0 ? end : found
    }
    const first = this.#firstBytes
    while (at < end && first[bytes[at]] === 0) at++
    return at
  }

  #longest(bytes: Uint8Array, at: number, end: number): number {
    let node: number | undefined = 0
    let found = -1
    for (let i = at; i < end; i++) {
      node = this.#edges.get(node * 256 + bytes[i])
      if (node === undefined) break
      if (this.#tokenAt[node] >= 0) found = this.#tokenAt[node]
    }
    return found
  }
}

/** `\w`: letters, marks, decimal digits, connectors, joiners (Unicode TR18; letters and marks stand for Alphabetic). */
function isWord(code: number): boolean {
  const kind = classOf[code]
  if ((kind >= 1 && kind <= LETTER) || kind === MARK) return true
  if (code < 0x80) return (code >= 0x30 && code <= 0x39) || code === 0x5f
  return /[\p{Alphabetic}\p{Nd}\p{Pc}\p{Join_Control}]/u.test(String.fromCodePoint(code))
}
