/** @file Opens native system libraries with koffi. */
import type { MoeError } from '@moe/core'

export type Koffi = typeof import('koffi')

/**
 * Returns the result of `open` for the first library that it can open.
 * @param missing makes the error that is thrown if none can be opened; `problem` lists what was tried
 */
export async function openFirst<T>(
  what: string,
  names: readonly string[],
  open: (koffi: Koffi, name: string) => T,
  missing: (problem: string) => MoeError,
): Promise<T> {
  const koffi = await import('koffi').then(
    module => (module as unknown as { default?: Koffi }).default ?? module,
    cause => {
      throw missing(`cannot load koffi, which calls the library: ${messageOf(cause)}`)
    },
  )
  const reasons: string[] = []
  for (const name of names) {
    try {
      return open(koffi, name)
    } catch (cause) {
      reasons.push(`${name}: ${messageOf(cause)}`)
    }
  }
  throw missing(`no ${what} found (${reasons.join('; ')})`)
}

const messageOf = (cause: unknown) => (cause instanceof Error ? cause.message : `${cause}`)
