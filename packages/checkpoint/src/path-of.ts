/** @file Paths and addresses as callers pass them. */
import { fileURLToPath } from 'node:url'
import { MoeError } from '@moe/core'

/**
 * A path of the file system from a text or a file URL, such as `new URL('model', import.meta.url)`.
 * @param op who asks, for the error
 * @throws {MoeError} `E_ATTR` for anything else, an address of the web among it; `E_UNSUPPORTED` in a browser, where no path leads anywhere
 * @internal
 */
export function pathOf(op: string, path: string | URL): string {
  const isPath = typeof path === 'string' ? !WEB.test(path) : path instanceof URL && path.protocol === 'file:'
  if (!isPath) {
    throw new MoeError({ code: 'E_ATTR', op, problem: `the path is ${path}`, fix: 'pass a text or a file URL' })
  }
  // Bun and Deno say a version of Node, too.
  if (globalThis.process?.versions?.node === undefined) {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op,
      problem: `${path} is a path, and browsers have none`,
      fix: 'pass what is read itself (texts, files, an address), and the handle of a folder to write to',
    })
  }
  return typeof path === 'string' ? path : fileURLToPath(path)
}

const WEB = /^https?:\/\//i

/**
 * The address that a text or a URL is, or undefined.
 * @param op who asks, for the error
 * @throws {MoeError} `E_ATTR` for one that cannot be asked for
 */
export function webAddress(op: string, place: unknown): URL | undefined {
  if (!(place instanceof URL ? /^https?:$/.test(place.protocol) : typeof place === 'string' && WEB.test(place))) return
  const refuse = (problem: string, fix?: string) => new MoeError({ code: 'E_ATTR', op, problem, fix })
  let address: URL
  try {
    address = new URL(place as string | URL)
  } catch {
    throw refuse(`${JSON.stringify(place)} is no address`)
  }
  if (address.username || address.password) {
    throw refuse(`the address at ${address.host} has a user or password in it`, 'pass { fetch } that sends them')
  }
  return address
}
