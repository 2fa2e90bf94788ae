import { fallbacks } from '@moe/core'
import { backendSuite } from '@moe/core/testing'
import { expect, test } from 'vitest'
import { testBackend, unavailable } from './test-backend.ts'

// A fault ends a backend for good, so each check has its own.
const names = backendSuite(testBackend).map(check => check.name)

for (const [i, name] of names.entries()) {
  test.skipIf(unavailable)(name, async () => {
    let backend: Awaited<ReturnType<typeof testBackend>> | undefined
    const make = async () => {
      backend = await testBackend()
      return backend
    }
    try {
      await backendSuite(make)[i].run()
      await backend?.sync()
    } finally {
      backend?.dispose()
    }
  })
}

test.skipIf(unavailable)('no fused op of the suite fell back to its decomposition', () => {
  expect(fallbacks().filter(({ backend }) => backend === 'kernels-cuda')).toEqual([])
})
