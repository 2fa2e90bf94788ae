/** @file Paths and addresses as callers pass them. */
import { fileURLToPath } from 'node:url'
import { MoeError } from '@moe/core'

/**
 * A path of the file system from a text or a file URL, such as `new URL('model', import.meta.url)`.
 * @param op who asks, for the error
 * @throws {MoeError} `E_ATTR` for anything else, an address of the web among it
 * @internal
 */
export function pathOf(op: string, path: string | URL): string {
  if (typeof path === 'string' && !WEB.test(path)) return path
  if (path instanceof URL && path.protocol === 'file:') return fileURLToPath(path)
  throw new MoeError({ code: 'E_ATTR', op, problem: `the path is ${path}`, fix: 'pass a text or a file URL' })
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
