/** @file Index from steps to lines of a log, in bounded memory. */

/** A range of bytes of a file that covers complete lines. */
export interface ByteRange {
  readonly from: number
  readonly to: number
}

/**
 * Blocks of consecutive lines, by their first steps. When there are twice as many blocks as requested, neighbors are
 * merged.
 */
export class LineIndex {
  readonly #blocks: number
  #linesPerBlock = 1
  /** Number of lines in the last block. */
  #lines = 0
  #steps: number[] = []
  #offsets: number[] = []
  /** End of the last line. */
  #end = 0
  #last = -1

  /** @param blocks minimum number of blocks for a log that is long enough */
  constructor(blocks = 1024) {
    this.#blocks = blocks
  }

  /** First and last step; null if there are no lines. */
  get span(): { readonly first: number; readonly last: number } | null {
    return this.#steps.length === 0 ? null : { first: this.#steps[0], last: this.#last }
  }

  /**
   * Adds the next line. A line whose step is not larger than the last one restarts the log from there: blocks that
   * start at its step or later are merged into the block before them, whose reader skips the lines that no longer
   * count.
   */
  push(step: number, at: number, end: number): void {
    while (this.#steps.length > 0 && this.#steps[this.#steps.length - 1] >= step) {
      this.#steps.pop()
      this.#offsets.pop()
    }
    this.#end = end
    this.#last = step
    if (this.#steps.length === 0) at = 0
    else if (this.#lines < this.#linesPerBlock) {
      this.#lines++
      return
    }
    if (this.#steps.length >= 2 * this.#blocks) this.#halve()
    this.#steps.push(step)
    this.#offsets.push(at)
    this.#lines = 1
  }

  /** Bytes that contain all lines with steps from `from` to `to`. */
  between(from: number, to: number): ByteRange {
    const last = this.#blockOf(to)
    return last < 0
      ? { from: 0, to: 0 }
      : { from: this.#offsets[Math.max(0, this.#blockOf(from))], to: this.#endOf(last) }
  }

  /** Bytes that contain the first line whose step is `step` or later, or else the last line. */
  at(step: number): ByteRange {
    const block = Math.max(0, this.#blockOf(step))
    const next = this.#steps[block] === step ? block : Math.min(block + 1, this.#steps.length - 1)
    return next < 0 ? { from: 0, to: 0 } : { from: this.#offsets[block], to: this.#endOf(next) }
  }

  /**
   * First steps of the blocks from `from` to `to`; if there are more than `most`, an even selection that includes the
   * last.
   */
  spread(from: number, to: number, most: number): number[] {
    const steps = this.#steps.filter(step => step >= from && step <= to)
    const every = Math.max(1, Math.ceil(steps.length / most))
    return steps.filter((_, i) => (steps.length - 1 - i) % every === 0)
  }

  /** The last block that starts at or before a step; -1 if there is none. */
  #blockOf(step: number): number {
    let [low, high] = [0, this.#steps.length]
    while (low < high) {
      const middle = (low + high) >> 1
      if (this.#steps[middle] <= step) low = middle + 1
      else high = middle
    }
    return low - 1
  }

  #endOf(block: number): number {
    return this.#offsets[block + 1] ?? this.#end
  }

  #halve(): void {
    this.#linesPerBlock *= 2
    this.#steps = this.#steps.filter((_, i) => i % 2 === 0)
    this.#offsets = this.#offsets.filter((_, i) => i % 2 === 0)
  }
}
