/** @file Memory of large tensors: ranges of a few large segments, so that freed memory can be reused for tensors of any size. */

/** The source of segments, as in native/memory.h. */
export interface System {
  /** Returns 0 if out of memory. Memory that has not been written is not committed, on systems that support this (Linux, macOS). */
  allocate(bytes: number): number
  release(pointer: number, bytes: number): void
  /** Discards the contents, which are no longer needed. */
  discard(pointer: number, bytes: number): void
}

interface Range {
  start: number
  end: number
  /** How many of its bytes have been used since the system provided them. */
  used: number
}

interface Segment {
  readonly start: number
  readonly end: number
  /** In order of address; adjacent ranges are merged. */
  readonly free: Range[]
}

/** Ranges start at multiples of this. */
const granule = 4096
const [minSegment, maxSegment] = [64 * 2 ** 20, 2 ** 30]

const roundUp = (bytes: number) => Math.ceil(bytes / granule) * granule

/** A best-fit allocator: the smallest free range that is large enough serves a request, and adjacent free ranges are merged. */
export class Arena {
  readonly #system: System
  #segments: Segment[] = []
  #keptBytes = 0

  constructor(system: System) {
    this.#system = system
  }

  /** Bytes that are free but have been used, and are therefore still committed to the process. */
  get keptBytes(): number {
    return this.#keptBytes
  }

  /** Returns the address of `bytes` bytes, a multiple of 64; 0 if out of memory. */
  take(bytes: number): number {
    const size = roundUp(bytes)
    let from: Segment | undefined
    let best = -1
    let least = Number.POSITIVE_INFINITY
    for (const segment of this.#segments) {
      for (let i = 0; i < segment.free.length; i++) {
        const { start, end } = segment.free[i]
        if (end - start < size || end - start >= least) continue
        from = segment
        best = i
        least = end - start
      }
    }
    if (from === undefined) {
      from = this.#grow(size)
      if (from === undefined) return 0
      best = 0
    }
    const range = from.free[best]
    const pointer = range.start
    const used = Math.min(range.used, size)
    range.used -= used
    this.#keptBytes -= used
    range.start += size
    if (range.start === range.end) from.free.splice(best, 1)
    return pointer
  }

  /** Frees memory. @param keep whether the process keeps it; otherwise its contents are discarded */
  give(pointer: number, bytes: number, keep: boolean): void {
    const size = roundUp(bytes)
    const { free } = this.#segments.find(({ start, end }) => pointer >= start && pointer < end) as Segment
    if (!keep) this.#system.discard(pointer, size)
    let range: Range = { start: pointer, end: pointer + size, used: keep ? size : 0 }
    this.#keptBytes += range.used
    let at = 0
    while (at < free.length && free[at].start < pointer) at++
    const before = free[at - 1]
    if (before?.end === range.start) {
      before.end = range.end
      before.used += range.used
      range = before
    } else {
      free.splice(at++, 0, range)
    }
    const behind = free[at]
    if (behind?.start !== range.end) return
    range.end = behind.end
    range.used += behind.used
    free.splice(at, 1)
  }

  /** Takes over the segments of another arena. */
  absorb(other: Arena): void {
    this.#segments.push(...other.#segments.splice(0))
    this.#keptBytes += other.#keptBytes
    other.#keptBytes = 0
  }

  /** Returns free memory to the system. */
  trim(): void {
    this.#segments = this.#segments.filter(({ start, end, free }) => {
      if (free.length === 1 && free[0].start === start && free[0].end === end) {
        this.#system.release(start, end - start)
        return false
      }
      for (const range of free) {
        if (range.used === 0) continue
        this.#system.discard(range.start, range.end - range.start)
        range.used = 0
      }
      return true
    })
    this.#keptBytes = 0
  }

  /** Adds a segment as large as all others together, within limits, or as large as needed. */
  #grow(size: number): Segment | undefined {
    const total = this.#segments.reduce((sum, { start, end }) => sum + end - start, 0)
    const wanted = Math.max(size, Math.min(maxSegment, Math.max(minSegment, total)))
    for (const bytes of wanted > size ? [wanted, size] : [size]) {
      const start = this.#system.allocate(bytes)
      if (start === 0) continue
      const segment = { start, end: start + bytes, free: [{ start, end: start + bytes, used: 0 }] }
      this.#segments.push(segment)
      return segment
    }
    return undefined
  }
}
