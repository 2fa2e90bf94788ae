/**
 * @file For the test project `models-on-cuda`: what `@moe/core/reference` is in the tests of the model parts, so that they try their parts on
 * the CUDA backend.
 */
import { testBackend } from './test-backend.ts'

const backend = await testBackend({ guarded: false })

export const referenceBackend = () => backend
