/** @file Reads the lines of a file that others write to, replace and remove. */
import { open } from 'node:fs/promises'

const chunkBytes = 1 << 20
/** Bytes read in one go, so that many files get their turn. */
const goBytes = 32 * chunkBytes
/** What is longer is no line of a log. */
const longestLine = 1 << 20

const newline = 10

export class TailedFile {
  readonly path: string
  /** When it was last written to, in milliseconds since 1970; 0 where there is none. */
  changed = 0
  /** Why it cannot be read. */
  problem: string | undefined
  #identity: string | undefined
  #offset = 0
  #rest: Buffer = Buffer.alloc(0)
  #skipping = false

  constructor(path: string) {
    this.path = path
  }

  /**
   * Reads what was added, whole lines only.
   * @param line gets each line
   * @param reset is called before the lines of a file that is another one, or was cut; and when it is gone
   * @returns whether there is more to read at once
   */
  async read(line: (text: string) => void, reset: () => void): Promise<boolean> {
    let file: Awaited<ReturnType<typeof open>>
    try {
      file = await open(this.path, 'r')
    } catch (error) {
      const gone = (error as NodeJS.ErrnoException).code === 'ENOENT'
      this.problem = gone ? undefined : (error as Error).message
      if (this.#identity !== undefined && gone) this.#restart(undefined, reset)
      if (gone) this.changed = 0
      return false
    }
    try {
      const { dev, ino, birthtimeMs, size, mtimeMs } = await file.stat()
      const identity = `${dev} ${ino} ${birthtimeMs}`
      if (this.#identity !== identity || size < this.#offset) this.#restart(identity, reset)
      this.changed = mtimeMs
      this.problem = undefined
      const until = Math.min(size, this.#offset + goBytes)
      while (this.#offset < until) {
        const { buffer, bytesRead } = await file.read(Buffer.allocUnsafe(chunkBytes), 0, chunkBytes, this.#offset)
        if (bytesRead === 0) break
        this.#offset += bytesRead
        this.#take(buffer.subarray(0, bytesRead), line)
      }
      return this.#offset < size
    } catch (error) {
      this.problem = (error as Error).message
      return false
    } finally {
      await file.close()
    }
  }

  #restart(identity: string | undefined, reset: () => void): void {
    if (this.#identity !== undefined) reset()
    this.#identity = identity
    this.#offset = 0
    this.#rest = Buffer.alloc(0)
    this.#skipping = false
  }

  #take(bytes: Buffer, line: (text: string) => void): void {
    const whole = this.#rest.length === 0 ? bytes : Buffer.concat([this.#rest, bytes])
    let at = 0
    for (let end = whole.indexOf(newline); end >= 0; end = whole.indexOf(newline, at)) {
      if (!this.#skipping && end > at) line(whole.toString('utf8', at, end))
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
