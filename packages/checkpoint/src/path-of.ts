/** @file Paths as callers pass them. */
import { fileURLToPath } from 'node:url'
import { MoeError } from '@moe/core'

/**
 * A path of the file system from a text or a file URL, such as `new URL('model', import.meta.url)`.
 * @param op who asks, for the error
 * @throws {MoeError} `E_ATTR` for anything else
 * @internal
 */
export function pathOf(op: string, path: string | URL): string {
  if (typeof path === 'string') return path
  if (path instanceof URL && path.protocol === 'file:') return fileURLToPath(path)
  throw new MoeError({ code: 'E_ATTR', op, problem: `the path is ${path}`, fix: 'pass a text or a file URL' })
}
