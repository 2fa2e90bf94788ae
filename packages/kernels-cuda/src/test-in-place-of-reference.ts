/**
 * @file For the test project `models-on-cuda`: replaces `@moe/core/reference` in the tests of the model packages, so that they run on the CUDA
 * backend.
 */
import { testBackend } from './test-backend.ts'

const backend = await testBackend({ guarded: false })

export const referenceBackend = () => backend
