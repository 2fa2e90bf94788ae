/** @file The default backend, and how to find one that works on this machine. */
import type { Backend } from './backend.ts'
import { checkBackend } from './checks.ts'
import { describe, isMoeError, MoeError, shown } from './errors.ts'
import { checkOptions } from './options.ts'

let current: Backend | null = null

/**
 * Sets the backend on which creation functions put their tensors.
 * @throws MoeError E_ATTR if it is not a backend, for example a promise of one
 */
export function setDefaultBackend(backend: Backend): void {
  checkBackend('setDefaultBackend', backend)
  current = backend
}

/** Returns the backend set by `setDefaultBackend`. @throws MoeError E_NO_BACKEND if none was set */
export function defaultBackend(): Backend {
  if (current === null) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'defaultBackend',
      problem: 'no default backend is set',
      fix: "call setDefaultBackend(await firstAvailable([() => import('@moe/kernels-cpu'), () => import('@moe/backend-tfjs')])) first",
    })
  }
  return current
}

/** The exports of a backend package that `firstAvailable` uses. */
export interface BackendModule {
  /**
   * Opens the backend.
   * @throws MoeError E_NO_BACKEND if its device or library is missing, E_UNSUPPORTED if it cannot run on this machine
   */
  createBackend(): Promise<Backend>
}

/**
 * Returns the first backend of the list that loads and finds its device. Skips packages that are not installed and
 * backends that throw E_NO_BACKEND or E_UNSUPPORTED, and passes the reason to `onSkip`.
 * @throws MoeError E_NO_BACKEND with all reasons if none works, E_ATTR if `loaders` is not a list of functions
 */
export async function firstAvailable(
  loaders: ReadonlyArray<() => Promise<BackendModule>>,
  options: { onSkip?: (reason: string) => void } = {},
): Promise<Backend> {
  checkOptions('firstAvailable', options, { onSkip: true })
  if (!Array.isArray(loaders) || loaders.some(load => typeof load !== 'function')) {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'firstAvailable',
      problem: `the loaders are ${Array.isArray(loaders) ? shown(loaders) : describe(loaders)}, not a list of functions`,
      fix: "pass functions that import a backend: firstAvailable([() => import('@moe/kernels-cpu')])",
    })
  }
  const reasons: string[] = []
  for (const load of loaders) {
    try {
      const module = await load()
      return await module.createBackend()
    } catch (error) {
      const missing = (error as { code?: string }).code === 'ERR_MODULE_NOT_FOUND'
      if (!missing && !isMoeError(error, 'E_NO_BACKEND') && !isMoeError(error, 'E_UNSUPPORTED')) throw error
      const reason = error instanceof Error ? error.message : String(error)
      reasons.push(reason)
      options.onSkip?.(reason)
    }
  }
  throw new MoeError({
    code: 'E_NO_BACKEND',
    op: 'firstAvailable',
    problem:
      reasons.length === 0
        ? 'the list of backends is empty'
        : `no backend could be used:\n${reasons.map(reason => `  - ${reason}`).join('\n')}\n`,
    fix:
      reasons.length === 0
        ? "pass at least one: [() => import('@moe/kernels-cpu')]"
        : 'install one of them, or fix the first reason',
  })
}
