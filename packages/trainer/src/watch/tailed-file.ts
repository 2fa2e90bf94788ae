/** @file Reads the lines of a file that other processes append to, replace and remove. */
import { open } from 'node:fs/promises'
import { LineSplitter, type LineTaker } from '../report/line-splitter.ts'

const chunkBytes = 1 << 20
/** Maximum number of bytes per call, so that many files take turns. */
const goBytes = 32 * chunkBytes

export class TailedFile {
  readonly path: string
  /** Time of the last change in milliseconds since 1970; 0 if there is no file. */
  changed = 0
  /** Why the file cannot be read. */
  problem: string | undefined
  #identity: string | undefined
  #lines = new LineSplitter()

  constructor(path: string) {
    this.path = path
  }

  /**
   * Reads the complete lines that were added.
   *
   * @param line receives each line
   * @param reset called when the file is gone, and before the lines of a file that was replaced or truncated
   * @returns whether there is more to read
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
