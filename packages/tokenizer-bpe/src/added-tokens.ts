/**
 * @file Added tokens: strings that become a token before the text is pre-tokenized, with the flags of tokenizer.json.
 */
import { classOf, isSpace, LETTER, MARK } from './unicode/classes.ts'
import { codePointAt, previous, widthOf } from './unicode/utf8.ts'

/** An added token, with the field names of tokenizer.json. */
export interface AddedToken {
  /** Its id, below `vocabSize`. */
  readonly id: number
  /** Its exact text. */
  readonly content: string
  /**
   * Whether `decode` with `skipSpecialTokens` omits it, and `encode` with `parseSpecialTokens: false` reads it as text.
   */
  readonly special: boolean
  /**
   * Whether its normalized content is searched for in the normalized text, rather than its content in the original
   * text.
   */
  readonly normalized: boolean
  /** Whether it includes the white space on its left. */
  readonly lstrip: boolean
  /** Whether it includes the white space on its right. */
  readonly rstrip: boolean
  /** Whether it is only recognized if no word character is adjacent. */
  readonly single_word: boolean
}

/**
 * Returns a function of positions in `bytes[..end)`, to be called with ascending ones: the index of the longest token
 * that starts there, or -1.
 */
export type TokenMatcher = (bytes: Uint8Array, end: number) => (position: number) => number

/**
 * Creates a matcher that replaces the trie if there are long tokens: at worst the trie takes as many steps at every
 * position as a token has bytes. Outside of browsers it is aho-corasick.ts; browsers leave it out to save code.
 */
export const longTokenMatcher: { create?: (contents: readonly Uint8Array[]) => TokenMatcher | undefined } = {}

/** Which added tokens are ignored, so that they are encoded as text: 0 none, 1 special tokens, 2 all. */
export type Ignored = 0 | 1 | 2

/** Finds added tokens in a text: the leftmost, and of those the longest. */
export class AddedTokenFinder {
  readonly #contents: Uint8Array[] = []
  readonly #tokens: AddedToken[] = []
  readonly #matcher: TokenMatcher | undefined
  /** Edges of a trie over the tokens' bytes: `node * 256 + byte` to node. */
  readonly #edges = new Map<number, number>()
  /** Index of the token that ends at each node, or -1. */
  readonly #tokenAt = [-1]
  /** 1 for each byte that a token starts with. */
  readonly #firstBytes = new Uint8Array(256)
  /** The first byte of all tokens if it is the same, usually `<`; otherwise -1. */
  #onlyFirst = -1

  /** @param contentOf returns the bytes to search for */
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
    this.#matcher = longTokenMatcher.create?.(this.#contents)
    if (first.size === 1) [this.#onlyFirst] = first
  }

  /**
   * Splits `bytes[start..end)` at added tokens. Calls `token` for each, and `text` for the text between them, in order.
   */
  split(
    bytes: Uint8Array,
    start: number,
    end: number,
    ignored: Ignored,
    text: (start: number, end: number) => void,
    token: (token: AddedToken, start: number, end: number) => void,
  ): void {
    const match = this.#matcher?.(bytes, end)
    let done = start
    /** End of the white space that `rstrip` included last. */
    let spaceEnd = 0
    let at = this.#tokens.length === 0 ? end : start
    while (at < end) {
      at = this.#nextCandidate(bytes, at, end)
      if (at >= end) break
      const found = match ? match(at) : this.#longest(bytes, at, end)
      if (found < 0) {
        at++
        continue
      }
      const added = this.#tokens[found]
      let from = at
      let to = at + this.#contents[found].length
      at = to
      if (ignored > (added.special ? 0 : 1)) continue
      if (added.single_word) {
        const touchesLeft = from > start && isWord(codePointAt(bytes, previous(bytes, from)))
        const touchesRight = to < end && isWord(codePointAt(bytes, to))
        if (touchesLeft || touchesRight) continue
      }
      if (added.lstrip) {
        while (from > done) {
          const before = previous(bytes, from)
          if (!isSpace(codePointAt(bytes, before))) break
          from = before
        }
        // `rstrip` of the previous token may include this white space already.
        from = Math.max(from, done)
        if (from >= to) continue
      }
      if (added.rstrip) {
        // Tokens of white space would otherwise read the same run again and again.
        to = Math.max(to, spaceEnd)
        while (to < end && isSpace(codePointAt(bytes, to))) to += widthOf(bytes[to])
        spaceEnd = to
      }
      if (done < from) text(done, from)
      token(added, from, to)
      done = to
    }
    if (done < end) text(done, end)
  }

  /** Returns the next position of a byte that a token starts with. */
  #nextCandidate(bytes: Uint8Array, at: number, end: number): number {
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

/** Whether a code point matches `\w`: Alphabetic, Mark, Nd, Pc, Join_Control (Unicode TR18). */
function isWord(code: number): boolean {
  const kind = classOf[code]
  if ((kind >= 1 && kind <= LETTER) || kind === MARK) return true
  if (code < 0x80) return (code >= 0x30 && code <= 0x39) || code === 0x5f
  return /[\p{Alphabetic}\p{Nd}\p{Pc}\p{Join_Control}]/u.test(String.fromCodePoint(code))
}
