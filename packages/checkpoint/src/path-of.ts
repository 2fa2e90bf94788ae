/** @file Validates paths and web addresses that callers pass. */
import { fileURLToPath } from 'node:url'
import { MoeError } from '@moe/core'

/**
 * Returns the file system path of a string or file URL, for example `new URL('model', import.meta.url)`.
 * @param op the calling function, for error messages
 * @throws {MoeError} `E_ATTR` for anything else, including web addresses; `E_UNSUPPORTED` in browsers
 * @internal
 */
export function pathOf(op: string, path: string | URL): string {
  const isPath = typeof path === 'string' ? !WEB.test(path) : path instanceof URL && path.protocol === 'file:'
  if (!isPath) {
    throw new MoeError({
      code: 'E_ATTR',
      op,
      problem: `expected a path, got ${path}`,
      fix: 'pass a string or file URL',
    })
  }
  // Bun and Deno report a Node version too.
  if (globalThis.process?.versions?.node === undefined) {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op,
      problem: `${path} is a path, and browsers have no file system`,
      fix: 'pass the content itself (strings, files or a URL); to write, pass a folder handle',
    })
  }
  return typeof path === 'string' ? path : fileURLToPath(path)
}

const WEB = /^https?:\/\//i

/**
 * Returns the web address that a string or URL contains, or undefined if it is not `http(s):`.
 * @param op the calling function, for error messages
 * @throws {MoeError} `E_ATTR` for an invalid address, or one with a user name or password
 */
export function webAddress(op: string, location: unknown): URL | undefined {
  if (
    !(location instanceof URL
      ? /^https?:$/.test(location.protocol)
      : typeof location === 'string' && WEB.test(location))
  )
    return
  const refuse = (problem: string, fix?: string) => new MoeError({ code: 'E_ATTR', op, problem, fix })
  let address: URL
  try {
    address = new URL(location as string | URL)
  } catch {
    throw refuse(`invalid URL ${JSON.stringify(location)}`)
  }
  if (address.username || address.password) {
    throw refuse(`the URL of ${address.host} contains a user name or password`, 'send them in your own { fetch }')
  }
  return address
}
