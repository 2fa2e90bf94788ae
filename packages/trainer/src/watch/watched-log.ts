/** @file A growing log of steps: delivers each line once when it is added, and can read lines again later. */
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

  /** @param blocks number of blocks of its index */
  constructor(path: string, blocks?: number) {
    this.file = new TailedFile(path)
    this.#blocks = blocks
    this.#index = new LineIndex(blocks)
  }

  /** First and last step; null if there are no lines. */
  get span(): LineIndex['span'] {
    return this.#index.span
  }

  /** Number of lines that could not be parsed. */
  get badLines(): number {
    return this.#badLines
  }

  /**
   * Reads what was added.
   *
   * @param line receives each line
   * @param reset called when the earlier lines are gone
   * @returns whether there is more to read
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
   * Reads the lines with steps from `from` to `to` again. If a run was resumed, steps may occur twice: the later line
   * counts, and earlier lines of later steps do not.
   *
   * @param restart called when none of the lines so far counts
   */
  async between(from: number, to: number, line: (fields: StepLine) => void, restart: () => void): Promise<void> {
    await this.#read(this.#index.between(from, to), fields => {
      if (fields.step < from) restart()
      else if (fields.step <= to) line(fields)
    })
  }

  /** The first line whose step is `step` or later, or else the last line. Undefined if there are no lines. */
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

  /** The lines with steps from `from` to `to`; if there are more than `most`, an even selection. */
  async spread(from: number, to: number, most: number): Promise<StepLine[]> {
    const lines: StepLine[] = []
    for (const step of this.#index.spread(from, to, most)) {
      const line = await this.at(step)
      if (line !== undefined) lines.push(line)
    }
    return lines
  }

  /** If the file was replaced in the meantime, it has other lines there, or none. */
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
