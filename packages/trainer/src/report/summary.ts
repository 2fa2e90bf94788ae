/** @file `summary.json`: what a run came to, for programs. */
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { MoeError } from '@moe/core'

/**
 * Writes values into `summary.json` of a run's folder, beside those that are there already: a program adds its own
 * (`mtp.acceptance`) to the trainer's. Numbers that are not finite become null. The file is replaced as a whole or not
 * at all.
 */
export function writeSummary(out: string, values: object): void {
  const path = join(out, 'summary.json')
  const temporary = `${path}.tmp`
  try {
    mkdirSync(out, { recursive: true })
    const before: unknown = existsSync(path) ? JSON.parse(readFileSync(path, 'utf8')) : {}
    writeFileSync(temporary, `${JSON.stringify({ ...(before as object), ...values }, null, 2)}\n`)
    renameSync(temporary, path)
  } catch (cause) {
    rmSync(temporary, { force: true })
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `writing failed: ${(cause as Error).message}`,
      fix: 'what was there before is unchanged',
      cause,
    })
  }
}
