/** @file Chooses the examples before an item (few-shot). */
import { MoeError, Random } from '@moe/core'
import type { PlacedItem } from './fields.ts'
import type { ExampleDraw } from './task.ts'

export interface ShotOptions {
  readonly shots: number
  readonly draw: ExampleDraw
  readonly seed: number
  readonly pool: readonly PlacedItem[]
  readonly groupOf: (item: PlacedItem) => string
}

/** Chooses examples from the pool, of the same group as the item and without the item itself. */
export class Shots {
  readonly #options: ShotOptions
  readonly #groups = new Map<string, PlacedItem[]>()

  constructor(options: ShotOptions) {
    this.#options = options
    for (const item of options.pool) {
      const group = options.groupOf(item)
      const known = this.#groups.get(group)
      if (known) known.push(item)
      else this.#groups.set(group, [item])
    }
  }

  /** The examples of an item, number `number` of the task. @throws MoeError E_DATA if there are too few */
  of(item: PlacedItem, number: number): PlacedItem[] {
    const { shots, draw, seed, groupOf } = this.#options
    if (shots === 0) return []
    const group = groupOf(item)
    const all = this.#groups.get(group) ?? []
    const random = new Random(seed).fork(draw === 'once' ? `shots/${group}` : `shots/${group}/${number}`)
    const chosen: PlacedItem[] = []
    for (const other of draw === 'first' ? all : drawn(all, random)) {
      if (!isSame(other, item)) chosen.push(other)
      if (chosen.length === shots) return chosen
    }
    const inGroup = group === '' ? '' : ` in the group ${group}`
    const problem = `shots is ${shots}, but there are only ${chosen.length} other items${inGroup}`
    throw new MoeError({ code: 'E_DATA', op: item.location, problem, fix: 'pass examples, or fewer shots' })
  }
}

/** The same file may be passed as items and as examples, and is read twice then. */
const isSame = (a: PlacedItem, b: PlacedItem): boolean => a.fields === b.fields || a.location === b.location

/** Draws items without replacement, one at a time. */
function* drawn<T>(items: readonly T[], random: Random): Generator<T> {
  const moved = new Map<number, T>()
  for (const [i, item] of items.entries()) {
    const j = i + random.integer(items.length - i)
    yield moved.get(j) ?? items[j]
    moved.set(j, moved.get(i) ?? item)
  }
}
