/** @file Reads the lines of a file that others write to, replace and remove. */
import { open } from 'node:fs/promises'
import { LineSplitter, type LineTaker } from '../report/line-splitter.ts'

const chunkBytes = 1 << 20
/** Bytes read in one go, so that many files get their turn. */
const goBytes = 32 * chunkBytes

export class TailedFile {
  readonly path: string
  /** When it was last written to, in milliseconds since 1970; 0 where there is none. */
  changed = 0
  /** Why it cannot be read. */
  problem: string | undefined
  #identity: string | undefined
  #lines = new LineSplitter()

  constructor(path: string) {
    this.path = path
  }

  /**
   * Reads what was added, whole lines only.
   * @param line gets each line
   * @param reset is called before the lines of a file that is another one, or was cut; and when it is gone
   * @returns whether there is more to read at once
   */
  async read(line: LineTaker, reset: () => void): Promise<boolean> {
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
      if (this.#identity !== identity || size < this.#lines.offset) this.#restart(identity, reset)
      this.changed = mtimeMs
      this.problem = undefined
      const lines = this.#lines
      const until = Math.min(size, lines.offset + goBytes)
      while (lines.offset < until) {
        const { buffer, bytesRead } = await file.read(Buffer.allocUnsafe(chunkBytes), 0, chunkBytes, lines.offset)
        if (bytesRead === 0) break
        lines.take(buffer.subarray(0, bytesRead), line)
      }
      return lines.offset < size
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
    this.#lines = new LineSplitter()
  }
}
