/** @file Loads optional TensorFlow.js packages, with errors that explain how to install missing ones. */
import { MoeError } from '@moe/core'
import type { TfNamespace } from './namespace.ts'

/** TensorFlow.js packages are CommonJS in Node (the namespace is `default`, or both) and ES modules in browsers. */
export function namespaceOf(module: unknown): TfNamespace {
  const { default: inner, ...own } = module as { default?: TfNamespace } & TfNamespace
  return (typeof own.getKernel === 'function' || inner === undefined ? module : inner) as TfNamespace
}

/** Imports a package. `install` is the command that installs it. */
export async function loadPackage(name: string, install: string, load: () => Promise<unknown>): Promise<unknown> {
  try {
    return await load()
  } catch (error) {
    const text = error instanceof Error ? error.message : String(error)
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: name,
      problem: isMissing(error, name) ? 'the package is not installed' : `the package failed to load: ${text.trim()}`,
      fix: install,
      details: { package: name },
      cause: error,
    })
  }
}

function isMissing(error: unknown, name: string): boolean {
  const { code, message = '' } = error as { code?: string; message?: string }
  return (code === 'ERR_MODULE_NOT_FOUND' || code === 'MODULE_NOT_FOUND') && message.includes(name)
}
