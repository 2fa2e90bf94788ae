import { backendSuite } from '@moe/core/testing'
import { describe, test } from 'vitest'
import { createBackend } from './backend.ts'

describe('kernels-webgpu', () => {
  for (const check of backendSuite(createBackend)) test(check.name, check.run)
})
