/** @file Recordings: the kernel calls of a function that is being captured, in order and with their arguments. */
import type { OpName } from '@moe/core'
import type { CpuBuffer } from './memory.ts'

/** Attributes that a replay can replace: the last `count` slots of a call. */
export interface RecordedAttrs {
  readonly op: OpName
  attrs: unknown
  readonly encode: (attrs: never) => readonly number[]
  readonly count: number
}

/** A recorded kernel call. */
export interface Call {
  readonly name: string
  readonly entry: (slots: number) => number
  readonly slots: number[]
  readonly varying: RecordedAttrs | null
}

/** The calls of a graph that is being captured. */
export class Recording {
  readonly calls: Call[] = []
  /** Buffers that the graph owns until it is disposed. */
  readonly buffers: CpuBuffer[] = []
  #varying: RecordedAttrs | null = null
  #isApart = false

  /**
   * Adds a call. With `common`, it is merged into the previous call if that has the same name and common values: see `Native.kernel`. Returns
   * whether it was.
   */
  add(name: string, entry: Call['entry'], slots: number[], common?: number): boolean {
    const last = this.calls.at(-1)
    const isApart = this.#isApart
    this.#isApart = false
    if (
      common !== undefined &&
      !isApart &&
      last?.name === name &&
      slots.every((value, i) => i > common || value === last.slots[i])
    ) {
      const count = common + 1
      last.slots[count]++
      last.slots.push(...slots.slice(count + 1))
      return true
    }
    this.calls.push({ name, entry, slots, varying: this.#varying })
    this.#varying = null
    return false
  }

  /** Keeps the next call apart from the previous one, because it writes memory that the previous one uses. */
  keepApart(): void {
    this.#isApart = true
  }

  /** Sets the attributes of the next call. */
  vary(attrs: RecordedAttrs): void {
    this.#varying = attrs
  }
}
