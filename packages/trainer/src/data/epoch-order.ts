/** @file An endless sequence of items in which each comes once per epoch. */
import type { Random } from '@moe/core'

/** Orders `count` items, shuffled again for every epoch. The order is a pure function of the index. */
export class EpochOrder {
  readonly #count: number
  readonly #random: Random
  #order: { readonly epoch: number; readonly items: Uint32Array } | null = null

  /** @param random seed of the orders; it is not advanced */
  constructor(count: number, random: Random) {
    this.#count = count
    this.#random = random
  }

  /** The item at `index` of the sequence. */
  at(index: number): number {
    const epoch = Math.floor(index / this.#count)
    if (this.#order?.epoch !== epoch) {
      const random = this.#random.fork(`epoch ${epoch}`)
      this.#order = { epoch, items: random.shuffle(Uint32Array.from({ length: this.#count }, (_, i) => i)) }
    }
    return this.#order.items[index - epoch * this.#count]
  }
}
