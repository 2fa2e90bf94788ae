import { backendSuite } from '@moe/core/testing'
import { describe, test } from 'vitest'
import { testBackend } from './test-gpu.ts'

const backend = await testBackend()

describe.skipIf(backend === null)('kernels-webgpu', () => {
  for (const check of backendSuite(async () => backend!)) test(check.name, check.run)
})
