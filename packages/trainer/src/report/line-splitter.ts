/** @file Lines of a log, from its bytes in pieces of any size. */
import { createReadStream } from 'node:fs'

/** What is longer is no line of a log. */
const longestLine = 1 << 22

const newline = 10

/** @param at byte of the file at which the line begins @param end byte behind its newline */
export type LineTaker = (text: string, at: number, end: number) => void

export class LineSplitter {
  #rest: Buffer = Buffer.alloc(0)
  #skipping = false
  /** Byte of the file that comes next. */
  #offset: number

  /** @param offset byte of the file at which the pieces begin */
  constructor(offset = 0) {
    this.#offset = offset
  }

  /** Bytes taken, counted from the beginning of the file. */
  get offset(): number {
    return this.#offset
  }

  /** Takes the next bytes. @param line gets each line that is whole now, empty ones aside */
  take(bytes: Buffer, line: LineTaker): void {
    const whole = this.#rest.length === 0 ? bytes : Buffer.concat([this.#rest, bytes])
    this.#offset += bytes.length
    const first = this.#offset - whole.length
    let at = 0
    for (let end = whole.indexOf(newline); end >= 0; end = whole.indexOf(newline, at)) {
      if (!this.#skipping && end > at) line(whole.toString('utf8', at, end), first + at, first + end + 1)
      this.#skipping = false
      at = end + 1
    }
    this.#rest = Buffer.from(whole.subarray(at))
    if (this.#rest.length > longestLine) {
      this.#rest = Buffer.alloc(0)
      this.#skipping = true
    }
  }
}

/** Gives the whole lines in a range of bytes, of which the first begins a line. The event loop has its turn between pieces. */
export async function eachLine(
  path: string,
  { from = 0, to = Number.POSITIVE_INFINITY }: { from?: number; to?: number },
  line: LineTaker,
): Promise<void> {
  if (to <= from) return
  const splitter = new LineSplitter(from)
  const pieces = createReadStream(path, { start: from, end: to - 1, highWaterMark: 1 << 18 })
  for await (const piece of pieces) splitter.take(piece as Buffer, line)
}
