/** @file `summary.json`: the result of a run, in machine-readable form. */
import { existsSync } from 'node:fs'
import { mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pathOf, renameWithRetry } from '@moe/checkpoint'
import { MoeError } from '@moe/core'

/**
 * Adds values to `summary.json` in a run's folder, so that a program can store its own results (for example
 * `mtp.acceptance`) with the trainer's. Numbers that are not finite become null. The file is replaced atomically.
 *
 * @throws MoeError E_CHECKPOINT if it cannot be written
 */
export async function writeSummary(out: string | URL, values: object): Promise<void> {
  const folder = pathOf('writeSummary', out)
  const path = join(folder, 'summary.json')
  const temporary = `${path}.tmp`
  try {
    await mkdir(folder, { recursive: true })
    const before: unknown = existsSync(path) ? JSON.parse(await readFile(path, 'utf8')) : {}
    await writeFile(temporary, `${JSON.stringify({ ...(before as object), ...values }, null, 2)}\n`)
    await renameWithRetry(temporary, path)
  } catch (cause) {
    await rm(temporary, { force: true })
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `writing failed: ${(cause as Error).message}`,
      fix: 'free disk space or close programs that have the file open; its previous content is unchanged',
      cause,
    })
  }
}
