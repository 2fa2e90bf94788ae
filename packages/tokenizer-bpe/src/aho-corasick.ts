/**
 * @file Finds added tokens in time linear in the text, however long they are, with an Aho-Corasick automaton (1975)
 * over the reversed tokens. It reads the text backwards, and so knows the longest token that starts at each position.
 */

import type { TokenMatcher } from './added-tokens.ts'

/** Number of bytes that are searched at once. */
const WINDOW = 1 << 16

/** Tokens of up to this many bytes are found as quickly by the trie. */
const SHORT = 192

/** Creates a matcher for tokens, none of which may be empty; undefined if none is long. */
export function createMatcher(contents: readonly Uint8Array[]): TokenMatcher | undefined {
  if (contents.every(({ length }) => length <= SHORT)) return undefined
  const automaton = new ReverseAutomaton(contents)
  return (bytes, end) => {
    const found = new Int32Array(Math.min(WINDOW, end))
    let from = 0
    let to = 0
    return position => {
      if (position >= to) {
        from = position
        to = Math.min(end, from + WINDOW)
        automaton.search(bytes, from, to, end, found)
      }
      return found[position - from]
    }
  }
}

class ReverseAutomaton {
  /** Edges of the trie: `node * 256 + byte` to node. */
  readonly #edges = new Map<number, number>()
  /** Failure link of each node: the node of the longest proper suffix of its string. */
  readonly #failure: number[] = [0]
  /** Index of the longest token that is a suffix of the node's string, or -1. */
  readonly #token: number[] = [-1]
  /** Length of the longest token. */
  readonly #longest: number
  /** @param contents bytes of each token; none is empty */
  constructor(contents: readonly Uint8Array[]) {
    this.#longest = contents.reduce((most, { length }) => Math.max(most, length), 0)
    for (const [token, content] of contents.entries()) {
      let node = 0
      for (let i = content.length - 1; i >= 0; i--) node = this.#child(node, content[i])
      this.#token[node] = token
    }
    // Failure links point to shallower nodes, which come first in breadth-first order.
    const children: Array<[parent: number, byte: number, node: number]>[] = this.#failure.map(() => [])
    for (const [key, node] of this.#edges) children[key >>> 8].push([key >>> 8, key & 255, node])
    const queue = [...children[0]]
    for (let i = 0; i < queue.length; i++) {
      const [parent, byte, node] = queue[i]
      const failure = parent === 0 ? 0 : this.#step(this.#failure[parent], byte)
      this.#failure[node] = failure
      if (this.#token[node] < 0) this.#token[node] = this.#token[failure]
      for (const child of children[node]) queue.push(child)
    }
  }

  /** Returns the child of a node, creating it if necessary. */
  #child(node: number, byte: number): number {
    const key = node * 256 + byte
    let next = this.#edges.get(key)
    if (next === undefined) {
      next = this.#failure.length
      this.#failure.push(0)
      this.#token.push(-1)
      this.#edges.set(key, next)
    }
    return next
  }

  /** Follows failure links until there is an edge for the byte. */
  #step(node: number, byte: number): number {
    while (true) {
      const next = this.#edges.get(node * 256 + byte)
      if (next !== undefined) return next
      if (node === 0) return 0
      node = this.#failure[node]
    }
  }

  /** Writes to `found` the index of the longest token that starts at each position of `from..to`, or -1. */
  search(bytes: Uint8Array, from: number, to: number, end: number, found: Int32Array): void {
    let node = 0
    for (let i = Math.min(end, to + this.#longest) - 1; i >= from; i--) {
      node = this.#step(node, bytes[i])
      if (i < to) found[i - from] = this.#token[node]
    }
  }
}
