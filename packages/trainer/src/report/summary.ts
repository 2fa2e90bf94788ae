/** @file `summary.json`: what a run came to, for programs. */
import { existsSync } from 'node:fs'
import { mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pathOf, renamePatiently } from '@moe/checkpoint'
import { MoeError } from '@moe/core'

/**
 * Writes values into `summary.json` of a run's folder, beside those that are there already: a program adds its own
 * (`mtp.acceptance`) to the trainer's. Numbers that are not finite become null. The file is replaced as a whole or not
 * at all.
 */
export async function writeSummary(out: string | URL, values: object): Promise<void> {
  const folder = pathOf('writeSummary', out)
  const path = join(folder, 'summary.json')
  const temporary = `${path}.tmp`
  try {
    await mkdir(folder, { recursive: true })
    const before: unknown = existsSync(path) ? JSON.parse(await readFile(path, 'utf8')) : {}
    await writeFile(temporary, `${JSON.stringify({ ...(before as object), ...values }, null, 2)}\n`)
    await renamePatiently(temporary, path)
  } catch (cause) {
    await rm(temporary, { force: true })
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `writing failed: ${(cause as Error).message}`,
      fix: 'what was there before is unchanged',
      cause,
    })
  }
}
