/** @file Added tokens: the strings that are cut out of a text before it is pre-tokenized, with the flags of tokenizer.json. */
import { classOf, LETTER, MARK, NEWLINE, SPACE } from './unicode/classes.ts'
import { codePointAt, previous, widthOf } from './unicode/utf8.ts'

/** One added token, in the spelling of tokenizer.json. */
export interface AddedToken {
  readonly id: number
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

/** Finds added tokens in bytes: leftmost, of those the longest. */
export class AddedTokenFinder {
  /** Edges of the trie: `node * 256 + byte` to node. */
  readonly #edges = new Map<number, number>()
  readonly #tokenAt: (AddedToken | undefined)[] = [undefined]
  readonly #firstBytes = new Uint8Array(256)
  /** The first byte of every token when they share one, as `<` of most; else -1. */
  #onlyFirst = -1
  readonly size: number

  /** @param contentOf bytes to look for, for each token */
  constructor(tokens: readonly AddedToken[], contentOf: (token: AddedToken) => Uint8Array) {
    const first = new Set<number>()
    let size = 0
    for (const token of tokens) {
      const content = contentOf(token)
      if (content.length === 0) continue
      size++
      let node = 0
      for (const byte of content) {
        const key = node * 256 + byte
        let next = this.#edges.get(key)
        if (next === undefined) {
          next = this.#tokenAt.length
          this.#tokenAt.push(undefined)
          this.#edges.set(key, next)
        }
        node = next
      }
      this.#tokenAt[node] = token
      this.#firstBytes[content[0]] = 1
      first.add(content[0])
    }
    this.size = size
    if (first.size === 1) this.#onlyFirst = [...first][0]
  }

  /**
   * Cuts `bytes[start..end)` at added tokens: calls `text` for what lies between and `token` for each, in order.
   * @param skipSpecial leaves special tokens in the text
   */
  split(
    bytes: Uint8Array,
    start: number,
    end: number,
    skipSpecial: boolean,
    text: (start: number, end: number) => void,
    token: (token: AddedToken, start: number, end: number) => void,
  ): void {
    if (this.size === 0) {
      if (start < end) text(start, end)
      return
    }
    let done = start
    let at = start
    while (at < end) {
      at = this.#candidate(bytes, at, end)
      if (at >= end) break
      const match = this.#longest(bytes, at, end)
      if (match === undefined) {
        at++
        continue
      }
      let from = at
      let to = this.#matchEnd
      at = to
      if (skipSpecial && match.special) continue
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

  #matchEnd = 0

  #longest(bytes: Uint8Array, at: number, end: number): AddedToken | undefined {
    let node = 0
    let found: AddedToken | undefined
    for (let i = at; i < end; i++) {
      const next = this.#edges.get(node * 256 + bytes[i])
      if (next === undefined) break
      node = next
      const token = this.#tokenAt[node]
      if (token !== undefined) {
        found = token
        this.#matchEnd = i + 1
      }
    }
    return found
  }
}

function isSpace(code: number): boolean {
  const kind = classOf[code]
  return kind === SPACE || kind === NEWLINE
}

/** `\w`: letters, marks, decimal digits, connectors, joiners (Unicode TR18; letters and marks stand for Alphabetic). */
function isWord(code: number): boolean {
  const kind = classOf[code]
  if ((kind >= 1 && kind <= LETTER) || kind === MARK) return true
  if (code < 0x80) return (code >= 0x30 && code <= 0x39) || code === 0x5f
  return /[\p{Alphabetic}\p{Nd}\p{Pc}\p{Join_Control}]/u.test(String.fromCodePoint(code))
}
