/** @file Reading and writing tokenizer.json: browsers have no files. */
import { readFile, rename, rm, writeFile } from 'node:fs/promises'
import { TokenizerError } from './errors.ts'
import { describe } from './json/check.ts'

/** @throws TokenizerError E_FORMAT for a file that cannot be read */
export async function readText(path: string | URL): Promise<string> {
  try {
    return await readFile(path, 'utf8')
  } catch (cause) {
    throw new TokenizerError({ code: 'E_FORMAT', op: `${path}`, problem: (cause as Error).message, cause })
  }
}

/** Writes a file, whole or not at all. @throws TokenizerError E_FORMAT for one that cannot be written */
export async function writeText(path: string | URL, text: string): Promise<void> {
  if (typeof path !== 'string' && !(path instanceof URL)) {
    const problem = `the path is ${describe(path)}`
    throw new TokenizerError({
      code: 'E_FORMAT',
      op: 'save',
      problem,
      fix: "pass a text or a file URL: 'tokenizer.json'",
    })
  }
  const partial = typeof path === 'string' ? `${path}.partial` : new URL(`${path.pathname}.partial`, path)
  try {
    await writeFile(partial, text)
    await rename(partial, path)
  } catch (cause) {
    await rm(partial, { force: true }).catch(() => undefined)
    const problem = `cannot be written: ${(cause as Error).message}`
    throw new TokenizerError({
      code: 'E_FORMAT',
      op: `${path}`,
      problem,
      fix: 'make its folder, or choose another place',
      cause,
    })
  }
}

export const parts = { files: { readText, writeText } }
