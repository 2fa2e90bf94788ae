/** @file Where in a log the lines of a step are, in bounded memory. */

/** Bytes of a file from the beginning of a line to the end of one. */
export interface ByteRange {
  readonly from: number
  readonly to: number
}

/** Blocks of consecutive lines by their first steps. When there are twice as many as asked for, neighbours become one. */
export class LineIndex {
  readonly #blocks: number
  #linesPerBlock = 1
  /** Lines of the last block. */
  #lines = 0
  #steps: number[] = []
  #offsets: number[] = []
  /** Behind the last line. */
  #end = 0
  #last = -1

  /** @param blocks least number of blocks of a log that is long enough */
  constructor(blocks = 1024) {
    this.#blocks = blocks
  }

  /** First step and last; null where there is no line. */
  get span(): { readonly first: number; readonly last: number } | null {
    return this.#steps.length === 0 ? null : { first: this.#steps[0], last: this.#last }
  }

  /**
   * Takes a line that lies behind those before. One that does not come after the last step begins anew from there: blocks that begin with its step or a later one are part of the block before them,
   * whose reader finds the lines that count behind those that do not.
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

  /** Bytes with all lines of steps from `from` to `to`. */
  between(from: number, to: number): ByteRange {
    const last = this.#blockOf(to)
    return last < 0
      ? { from: 0, to: 0 }
      : { from: this.#offsets[Math.max(0, this.#blockOf(from))], to: this.#endOf(last) }
  }

  /** Bytes with the first line whose step is `step` or later, or with the last line of all. */
  at(step: number): ByteRange {
    const block = Math.max(0, this.#blockOf(step))
    const next = this.#steps[block] === step ? block : Math.min(block + 1, this.#steps.length - 1)
    return next < 0 ? { from: 0, to: 0 } : { from: this.#offsets[block], to: this.#endOf(next) }
  }

  /** First steps of blocks from `from` to `to`, evenly spread if there are more than `most`; the last is among them. */
  spread(from: number, to: number, most: number): number[] {
    const steps = this.#steps.filter(step => step >= from && step <= to)
    const every = Math.max(1, Math.ceil(steps.length / most))
    return steps.filter((_, i) => (steps.length - 1 - i) % every === 0)
  }

  /** The last block that begins at a step or before; -1 if none does. */
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
