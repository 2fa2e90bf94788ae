/** @file Reads the documents of many files in batches that are large enough for several threads. */
import { statSync } from 'node:fs'
import { readTexts, type SourceOptions } from './source.ts'

/** Position of the next document: the index of its file, and the position in the file. */
export interface Place {
  readonly file: number
  readonly at: number
}

export interface Batch {
  readonly texts: readonly string[]
  /** Position after these texts. */
  readonly next: Place
  /** Bytes read so far, over all files. */
  readonly bytesRead: number
}

/** Input files in order. */
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

  /** @param characters approximate size of a batch */
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
