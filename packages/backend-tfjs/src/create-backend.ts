/** @file The backend that needs only npm packages: wasm, or plain JavaScript if wasm fails to start. */
import { type Backend, checkOptions, MoeError } from '@moe/core'
import { loadPackage, namespaceOf } from './load-package.ts'
import type { TfNamespace } from './namespace.ts'
import { tfjsBackend } from './tfjs-backend.ts'

/** Options of `createBackend`. */
export interface CreateBackendOptions {
  /** Folder or URL of the `.wasm` files, with a trailing slash. Default: next to the library, which works in Node and offline. */
  readonly wasmPaths?: string | undefined
  /**
   * Called with the reason if wasm fails to start and the much slower plain JavaScript backend is used instead. Default: prints a warning with
   * `console.warn`.
   */
  readonly onFallback?: ((reason: string) => void) | undefined
}

type Settable = TfNamespace & { setBackend(name: string): Promise<boolean> }

/**
 * Creates a backend on `@tensorflow/tfjs-backend-wasm`, or on `@tensorflow/tfjs-backend-cpu` if wasm fails to start. Used by `firstAvailable`. If
 * TensorFlow.js already has a current backend, that stays current.
 * @throws MoeError E_NO_BACKEND if neither is installed
 */
export async function createBackend(options: CreateBackendOptions = {}): Promise<Backend> {
  checkOptions('createBackend', options, { wasmPaths: true, onFallback: true })
  const install = 'npm install @tensorflow/tfjs-core @tensorflow/tfjs-backend-wasm'
  const core = await loadPackage('@tensorflow/tfjs-core', install, () => import('@tensorflow/tfjs-core'))
  const tf = namespaceOf(core) as Settable
  const before = tf.getBackend()
  try {
    return await wasmBackend(tf, options, install)
  } catch (error) {
    const backend = await plainBackend(tf, error)
    const reason = error instanceof Error ? error.message : String(error)
    const { onFallback = warn } = options
    onFallback(reason)
    return backend
  } finally {
    if (before && before !== tf.getBackend()) await tf.setBackend(before)
  }
}

async function wasmBackend(tf: Settable, { wasmPaths }: CreateBackendOptions, install: string): Promise<Backend> {
  const name = '@tensorflow/tfjs-backend-wasm'
  const module = await loadPackage(name, install, () => import('@tensorflow/tfjs-backend-wasm'))
  if (wasmPaths !== undefined) (module as { setWasmPaths(prefix: string): void }).setWasmPaths(wasmPaths)
  if (!(await tf.setBackend('wasm'))) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: name,
      problem: 'the wasm module failed to start',
      fix: "pass { wasmPaths } with the folder of the package's .wasm files (dist/)",
    })
  }
  return tfjsBackend(tf, { backend: 'wasm', device: 'TensorFlow.js wasm (XNNPACK)' })
}

function warn(reason: string): void {
  console.warn(
    `@moe/backend-tfjs: using plain JavaScript, which is many times slower than wasm: ${reason} (pass { onFallback } to handle this)`,
  )
}

async function plainBackend(tf: Settable, cause: unknown): Promise<Backend> {
  const name = '@tensorflow/tfjs-backend-cpu'
  try {
    await loadPackage(name, `npm install ${name}`, () => import('@tensorflow/tfjs-backend-cpu'))
  } catch {
    throw cause
  }
  await tf.setBackend('cpu')
  // Otherwise its first tensor prints an advertisement for tfjs-node.
  ;(tf.findBackend('cpu') as { firstUse?: boolean }).firstUse = false
  return tfjsBackend(tf, { backend: 'cpu', device: 'TensorFlow.js cpu (plain JavaScript)' })
}
