/** @file Documents of many files in batches of a size that is worth several threads. */
import { statSync } from 'node:fs'
import { readTexts, type SourceOptions } from './source.ts'

/** Where the next document is: the number of a file, and a place in it. */
export interface Place {
  readonly file: number
  readonly at: number
}

export interface Batch {
  readonly texts: readonly string[]
  /** Behind them. */
  readonly next: Place
  /** Bytes of all files read so far. */
  readonly bytesRead: number
}

/** Files in order. */
export class Sources {
  readonly paths: readonly string[]
  readonly sizes: readonly number[]
  readonly bytes: number
  readonly #options: SourceOptions

  constructor(paths: readonly string[], options: SourceOptions) {
    this.paths = paths
    this.sizes = paths.map(path => statSync(path).size)
    this.bytes = this.#before(paths.length)
    this.#options = options
  }

  #before(file: number): number {
    return this.sizes.slice(0, file).reduce((sum, size) => sum + size, 0)
  }

  /** @param characters of a batch, about */
  async *batches(from: Place, characters: number): AsyncGenerator<Batch> {
    let texts: string[] = []
    let size = 0
    let before = this.#before(from.file)
    for (let file = from.file; file < this.paths.length; file++) {
      for await (const part of readTexts(this.paths[file], file === from.file ? from.at : 0, this.#options)) {
        for (const text of part.texts) {
          texts.push(text)
          size += text.length
        }
        if (size < characters) continue
        const bytesRead = before + Math.min(this.sizes[file], part.bytesRead)
        yield { texts, next: { file, at: part.next }, bytesRead }
        texts = []
        size = 0
      }
      before += this.sizes[file]
    }
    if (texts.length > 0) yield { texts, next: { file: this.paths.length, at: 0 }, bytesRead: this.bytes }
  }
}
