/** @file Libraries of the system, opened with koffi. */
import type { MoeError } from '@moe/core'

export type Koffi = typeof import('koffi')

/**
 * What `open` makes of the first of several libraries that it does not fail with.
 * @param missing the error that there is none, with what was tried
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
      throw missing(`koffi, which calls it, does not load: ${messageOf(cause)}`)
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
  throw missing(`no ${what} (${reasons.join('; ')})`)
}

const messageOf = (cause: unknown) => (cause instanceof Error ? cause.message : `${cause}`)
