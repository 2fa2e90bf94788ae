/** @file An endless sequence of items in which each comes once an epoch. */
import type { Random } from '@moe/core'

/** Numbers of `count` items, in an order drawn anew for every epoch: a function of the place alone. */
export class EpochOrder {
  readonly #count: number
  readonly #random: Random
  #order: { readonly epoch: number; readonly items: Uint32Array } | null = null

  /** @param random names the orders, and stays as it is */
  constructor(count: number, random: Random) {
    this.#count = count
    this.#random = random
  }

  /** Which item stands at place `index`. */
  at(index: number): number {
    const epoch = Math.floor(index / this.#count)
    if (this.#order?.epoch !== epoch) {
      const random = this.#random.fork(`epoch ${epoch}`)
      this.#order = { epoch, items: random.shuffle(Uint32Array.from({ length: this.#count }, (_, i) => i)) }
    }
    return this.#order.items[index - epoch * this.#count]
  }
}
