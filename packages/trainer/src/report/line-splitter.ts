/** @file Splits the bytes of a log, in pieces of any size, into lines. */
import { createReadStream } from 'node:fs'

/** Longer lines are skipped: they are not from a log of ours. */
const longestLine = 1 << 22

const newline = 10

/** @param at byte offset of the line in the file @param end byte offset after its newline */
export type LineTaker = (text: string, at: number, end: number) => void

export class LineSplitter {
  #rest: Buffer = Buffer.alloc(0)
  #skipping = false
  /** Byte offset of the next piece. */
  #offset: number

  /** @param offset byte offset of the first piece */
  constructor(offset = 0) {
    this.#offset = offset
  }

  /** Byte offset in the file up to which pieces were taken. */
  get offset(): number {
    return this.#offset
  }

  /** Takes the next bytes. @param line receives each line that is now complete, except empty ones */
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

/** Reads the complete lines in a range of bytes that starts at a line. Yields to the event loop between pieces. */
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
