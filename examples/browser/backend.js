/** @file Chooses the backend of the pages. */
import { firstAvailable } from '@moe/core'

/** WebGPU if available, else TensorFlow.js on WebAssembly. */
export const pickBackend = () => firstAvailable([() => import('@moe/kernels-webgpu'), () => tfjsOnWasm])

const tfjsOnWasm = {
  createBackend: async () => {
    const { createBackend } = await import('@moe/backend-tfjs')
    return createBackend({ wasmPaths: new URL('wasm/', location.href).href })
  },
}
