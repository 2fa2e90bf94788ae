/** @file A log of steps while it grows: each line once, as it comes, and any of them again later. */
import { eachLine } from '../report/line-splitter.ts'
import { type Fields, fieldsOf, isStep } from './json-fields.ts'
import { type ByteRange, LineIndex } from './line-index.ts'
import { TailedFile } from './tailed-file.ts'

export type StepLine = Fields & { readonly step: number }

export class WatchedLog {
  readonly file: TailedFile
  readonly #blocks: number | undefined
  #index: LineIndex
  #badLines = 0

  /** @param blocks of its index */
  constructor(path: string, blocks?: number) {
    this.file = new TailedFile(path)
    this.#blocks = blocks
    this.#index = new LineIndex(blocks)
  }

  /** First step and last; null where there is none. */
  get span(): LineIndex['span'] {
    return this.#index.span
  }

  /** Lines that are no lines of a log. */
  get badLines(): number {
    return this.#badLines
  }

  /**
   * Reads what was added.
   * @param line gets each line
   * @param reset is called when all lines before are gone
   * @returns whether there is more to read at once
   */
  refresh(line: (fields: StepLine) => void, reset: () => void): Promise<boolean> {
    return this.file.read(
      (text, at, end) => {
        const fields = stepLineOf(text)
        if (fields === undefined) {
          this.#badLines++
          return
        }
        this.#index.push(fields.step, at, end)
        line(fields)
      },
      () => {
        this.#index = new LineIndex(this.#blocks)
        this.#badLines = 0
        reset()
      },
    )
  }

  /**
   * Reads lines of steps from `from` to `to` again. Of steps that were taken again there are both lines: the later one counts, and those of later steps before it do not.
   * @param restart is called when none of the lines so far counts
   */
  async between(from: number, to: number, line: (fields: StepLine) => void, restart: () => void): Promise<void> {
    await this.#read(this.#index.between(from, to), fields => {
      if (fields.step < from) restart()
      else if (fields.step <= to) line(fields)
    })
  }

  /** The first line whose step is `step` or later, or the last line of all. Undefined where there is none. */
  async at(step: number): Promise<StepLine | undefined> {
    let found: StepLine | undefined
    let last: StepLine | undefined
    await this.#read(this.#index.at(step), fields => {
      last = fields
      if (fields.step < step) found = undefined
      else if (found === undefined || fields.step <= found.step) found = fields
    })
    return found ?? last
  }

  /** Lines of steps from `from` to `to`, evenly spread if there are more than `most`. */
  async spread(from: number, to: number, most: number): Promise<StepLine[]> {
    const lines: StepLine[] = []
    for (const step of this.#index.spread(from, to, most)) {
      const line = await this.at(step)
      if (line !== undefined) lines.push(line)
    }
    return lines
  }

  /** A file that was replaced in between has other lines there, or none. */
  async #read(range: ByteRange, line: (fields: StepLine) => void): Promise<void> {
    try {
      await eachLine(this.file.path, range, text => {
        const fields = stepLineOf(text)
        if (fields !== undefined) line(fields)
      })
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
    }
  }
}

function stepLineOf(text: string): StepLine | undefined {
  const fields = fieldsOf(text)
  return isStep(fields?.['step']) ? (fields as StepLine) : undefined
}
