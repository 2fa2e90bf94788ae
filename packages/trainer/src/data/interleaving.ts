/** @file Interleaves several sources in fixed proportions. */
import { Random } from '@moe/core'

type Node = number | { readonly share: number; readonly phase: number; readonly first: Node; readonly second: Node }

/** A place in the interleaved sequence: its source, and the index within that source. */
export interface SourcePlace {
  readonly source: number
  readonly index: number
}

/**
 * Interleaves sources so that any stretch of the sequence has their proportions, up to one or two places. Two sources
 * are distributed like the pixels of a slanted line: among the first n places, the first source has `floor(n * share +
 * phase)`. More sources are divided into two groups, recursively.
 */
export class Interleaving {
  readonly #root: Node
  readonly #count: number

  /** @param shares of the sources; they must sum to 1 */
  constructor(shares: readonly number[], seed: number) {
    const random = new Random(seed).fork('mixture')
    const divide = (from: number, to: number): Node => {
      if (to - from === 1) return from
      const middle = (from + to) >> 1
      const sum = (list: readonly number[]) => list.reduce((total, share) => total + share, 0)
      const share = sum(shares.slice(from, middle)) / sum(shares.slice(from, to))
      return { share, phase: random.next(), first: divide(from, middle), second: divide(middle, to) }
    }
    this.#root = divide(0, shares.length)
    this.#count = shares.length
  }

  at(place: number): SourcePlace {
    let node = this.#root
    let index = place
    while (typeof node === 'object') {
      const before = placesOfFirst(node, index)
      const isFirst = placesOfFirst(node, index + 1) > before
      index = isFirst ? before : index - before
      node = isFirst ? node.first : node.second
    }
    return { source: node, index }
  }

  /** Number of places of each source among the first `places`. */
  counts(places: number): number[] {
    const counts: number[] = new Array(this.#count).fill(0)
    const count = (node: Node, index: number): void => {
      if (typeof node === 'number') {
        counts[node] = index
        return
      }
      const before = placesOfFirst(node, index)
      count(node.first, before)
      count(node.second, index - before)
    }
    count(this.#root, places)
    return counts
  }
}

const placesOfFirst = ({ share, phase }: Exclude<Node, number>, places: number) => Math.floor(places * share + phase)
