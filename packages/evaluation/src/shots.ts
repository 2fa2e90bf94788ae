/** @file Examples in front of an item. */
import { MoeError, Random } from '@moe/core'
import type { PlacedItem } from './fields.ts'
import type { ExampleDraw } from './task.ts'

/** What examples are drawn from, and how. */
export interface ShotOptions {
  readonly shots: number
  readonly draw: ExampleDraw
  readonly seed: number
  readonly pool: readonly PlacedItem[]
  readonly groupOf: (item: PlacedItem) => string
}

/** Which examples stand in front of an item: as many of the pool, of the item's group, and not the item itself. */
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

  /** Of the item that is number `number` of the task. @throws MoeError E_DATA where there are too few */
  of(item: PlacedItem, number: number): PlacedItem[] {
    const { shots, draw, seed, groupOf } = this.#options
    if (shots === 0) return []
    const group = groupOf(item)
    const all = this.#groups.get(group) ?? []
    const others = all.filter(other => !isSame(other, item))
    if (others.length < shots) {
      const of = group === '' ? '' : ` of ${group}`
      const problem = `${shots} examples are asked for, and there are ${others.length} others${of}`
      throw new MoeError({ code: 'E_DATA', op: item.place, problem, fix: 'pass examples, or fewer shots' })
    }
    if (draw === 'first') return others.slice(0, shots)
    const random = new Random(seed).fork(draw === 'once' ? `shots/${group}` : `shots/${group}/${number}`)
    // One more for all, in case that the item is among them.
    const drawn = sample(all, Math.min(all.length, shots + 1), random)
    return drawn.filter(other => !isSame(other, item)).slice(0, shots)
  }
}

/** One file may serve for both, and be read twice. */
const isSame = (a: PlacedItem, b: PlacedItem): boolean => a.fields === b.fields || a.place === b.place

/** As many different ones, in random order. */
function sample<T>(items: readonly T[], count: number, random: Random): T[] {
  const moved = new Map<number, T>()
  return Array.from({ length: count }, (_, i) => {
    const j = i + random.integer(items.length - i)
    const chosen = moved.get(j) ?? items[j]
    moved.set(j, moved.get(i) ?? items[i])
    return chosen
  })
}
