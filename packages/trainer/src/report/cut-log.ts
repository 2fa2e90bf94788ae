/** @file Truncates a log of a run to the step of a checkpoint. */
import { createReadStream, createWriteStream, existsSync } from 'node:fs'
import { pipeline } from 'node:stream/promises'
import { renameWithRetry } from '@moe/checkpoint'
import { eachLine } from './line-splitter.ts'
import { writingFailed } from './log-file.ts'

/**
 * Drops the lines after a step, which a resumed run writes again, and everything from the first unreadable line on (a
 * crash may leave a partial one). The file may be too large for a string.
 *
 * @param onLine is called with each line that stays
 * @throws MoeError E_CHECKPOINT
 */
export async function cutLog<Line extends { readonly step: number }>(
  path: string,
  upToStep: number,
  onLine?: (line: Line) => void,
): Promise<void> {
  if (!existsSync(path)) return
  const temporary = `${path}.tmp`
  let kept = 0
  try {
    await eachLine(path, {}, (text, at, end) => {
      // Only lines that directly follow the kept ones are kept.
      const line = at === kept ? parsed<Line>(text) : undefined
      if (line === undefined || !(line.step <= upToStep)) return
      kept = end
      onLine?.(line)
    })
    await pipeline(kept === 0 ? [] : createReadStream(path, { end: kept - 1 }), createWriteStream(temporary))
    await renameWithRetry(temporary, path)
  } catch (cause) {
    throw writingFailed(path, cause)
  }
}

function parsed<Line>(text: string): Line | undefined {
  try {
    return JSON.parse(text) ?? undefined
  } catch {
    return undefined
  }
}
