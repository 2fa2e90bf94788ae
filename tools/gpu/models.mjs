// Preloaded by the tests of the model packages: replaces the f64 reference by the CUDA backend, as in the project `models-on-cuda`.
import { registerHooks } from 'node:module'

const inPlace = new URL('../../packages/kernels-cuda/src/test-in-place-of-reference.ts', import.meta.url).href
registerHooks({
  resolve: (specifier, context, next) =>
    specifier === '@moe/core/reference' ? { url: inPlace, shortCircuit: true } : next(specifier, context),
})
