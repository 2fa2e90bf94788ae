/** @file Reads and writes files (not in browsers). */
import { randomUUID } from 'node:crypto'
import { readFile, rename, rm, writeFile } from 'node:fs/promises'
import { TokenizerError } from './errors.ts'
import { describe } from './json/check.ts'

/** Reads a file. @throws TokenizerError E_FORMAT if it cannot be read */
export async function readText(path: string | URL): Promise<string> {
  try {
    return await readFile(path, 'utf8')
  } catch (cause) {
    throw new TokenizerError({ code: 'E_FORMAT', op: `${path}`, problem: (cause as Error).message, cause })
  }
}

/** Writes a file, completely or not at all. @throws TokenizerError E_FORMAT if it cannot be written */
export async function writeText(path: string | URL, text: string): Promise<void> {
  if (typeof path !== 'string' && !(path instanceof URL)) {
    const problem = `expected a path, got ${describe(path)}`
    throw new TokenizerError({
      code: 'E_FORMAT',
      op: 'save',
      problem,
      fix: "pass a string or a file URL, for example 'tokenizer.json'",
    })
  }
  // Two calls at the same time must not write to the same file.
  const suffix = `.${randomUUID()}.partial`
  const partial = typeof path === 'string' ? `${path}${suffix}` : new URL(`${path.pathname}${suffix}`, path)
  try {
    await writeFile(partial, text, { flush: true })
    await rename(partial, path)
  } catch (cause) {
    await rm(partial, { force: true }).catch(() => undefined)
    const problem = `cannot be written: ${(cause as Error).message}`
    throw new TokenizerError({
      code: 'E_FORMAT',
      op: `${path}`,
      problem,
      fix: 'create its folder, or choose another path',
      cause,
    })
  }
}

export const features = { files: { readText, writeText } }
