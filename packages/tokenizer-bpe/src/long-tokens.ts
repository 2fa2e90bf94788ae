/**
 * @file Where added tokens start, in time linear in the text whatever the tokens are: an automaton of Aho and Corasick (1975) over the tokens spelled
 * backwards, which reads the text from its end. At every place it knows the longest token that starts there.
 */

import type { TokenStarts } from './added-tokens.ts'

/** Places that are looked at together, in bytes. */
const WINDOW = 1 << 16

/** Bytes of a token up to which following the trie from every place is as good. */
const SHORT = 192

/** An automaton for tokens of which one is long; undefined where none is. None may be empty. */
export function startsOf(contents: readonly Uint8Array[]): TokenStarts | undefined {
  if (contents.every(({ length }) => length <= SHORT)) return undefined
  const automaton = new Backwards(contents)
  return (bytes, end) => {
    const found = new Int32Array(Math.min(WINDOW, end))
    let from = 0
    let to = 0
    return place => {
      if (place >= to) {
        from = place
        to = Math.min(end, from + WINDOW)
        automaton.read(bytes, from, to, end, found)
      }
      return found[place - from]
    }
  }
}

class Backwards {
  /** Edges of the trie: `node * 256 + byte` to node. */
  readonly #edges = new Map<number, number>()
  /** The longest proper suffix of a node's spelling that is a node, too. */
  readonly #shorter: number[] = [0]
  /** Number of the longest token that is a suffix of a node's spelling, or -1. */
  readonly #token: number[] = [-1]
  readonly #margin: number
  /** @param contents bytes of each token; none is empty */
  constructor(contents: readonly Uint8Array[]) {
    this.#margin = contents.reduce((most, { length }) => Math.max(most, length), 0)
    for (const [token, content] of contents.entries()) {
      let node = 0
      for (let i = content.length - 1; i >= 0; i--) node = this.#next(node, content[i])
      this.#token[node] = token
    }
    // A node's shorter ones are less deep, and come before it in breadth-first order.
    const children: Array<[parent: number, byte: number, node: number]>[] = this.#shorter.map(() => [])
    for (const [key, node] of this.#edges) children[key >>> 8].push([key >>> 8, key & 255, node])
    const queue = [...children[0]]
    for (let i = 0; i < queue.length; i++) {
      const [parent, byte, node] = queue[i]
      const shorter = parent === 0 ? 0 : this.#step(this.#shorter[parent], byte)
      this.#shorter[node] = shorter
      if (this.#token[node] < 0) this.#token[node] = this.#token[shorter]
      for (const child of children[node]) queue.push(child)
    }
  }

  #next(node: number, byte: number): number {
    const key = node * 256 + byte
    let next = this.#edges.get(key)
    if (next === undefined) {
      next = this.#shorter.length
      this.#shorter.push(0)
      this.#token.push(-1)
      this.#edges.set(key, next)
    }
    return next
  }

  #step(node: number, byte: number): number {
    while (true) {
      const next = this.#edges.get(node * 256 + byte)
      if (next !== undefined) return next
      if (node === 0) return 0
      node = this.#shorter[node]
    }
  }

  /** Puts the number of the longest token that starts at each place of `from..to` into `found`, or -1. */
  read(bytes: Uint8Array, from: number, to: number, end: number, found: Int32Array): void {
    let node = 0
    for (let i = Math.min(end, to + this.#margin) - 1; i >= from; i--) {
      node = this.#step(node, bytes[i])
      if (i < to) found[i - from] = this.#token[node]
    }
  }
}
