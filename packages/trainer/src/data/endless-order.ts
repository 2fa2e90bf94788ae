/** @file An endless sequence of items in which each comes once an epoch. */
import { Random } from '@moe/core'

/** Numbers of `count` items, in an order drawn anew for every epoch: a function of the place alone. */
export class EndlessOrder {
  readonly #count: number
  readonly #seed: number
  #order: { readonly epoch: number; readonly items: Uint32Array } | null = null

  constructor(count: number, seed: number) {
    this.#count = count
    this.#seed = seed
  }

  /** Which item stands at place `index`. */
  at(index: number): number {
    const epoch = Math.floor(index / this.#count)
    if (this.#order?.epoch !== epoch) {
      const random = new Random(this.#seed).fork(`epoch ${epoch}`)
      this.#order = { epoch, items: random.shuffle(Uint32Array.from({ length: this.#count }, (_, i) => i)) }
    }
    return this.#order.items[index - epoch * this.#count]
  }
}
