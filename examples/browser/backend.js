/** @file What the page computes on: the one place to choose it. */
import { firstAvailable } from '@moe/core'

/** The first that starts. */
export const pickBackend = () => firstAvailable([() => import('@moe/kernels-webgpu'), () => tfjsOnWasm])

const tfjsOnWasm = {
  createBackend: async () => {
    const { createBackend } = await import('@moe/backend-tfjs')
    return createBackend({ wasmPaths: new URL('wasm/', location.href).href })
  },
}
