import { expect, test, vi } from 'vitest'
import { createBackend } from './index.ts'

// A machine with two processors of 192 cores.
vi.mock('./load.ts', async original => {
  const load = await original<typeof import('./load.ts')>()
  return {
    ...load,
    loadLibrary: async (...args: Parameters<typeof load.loadLibrary>) => ({
      ...(await load.loadLibrary(...args)),
      defaultThreads: 384,
    }),
  }
})

test('on a machine with more CPUs than the pool has room for, the default is the most threads', async () => {
  vi.stubEnv('MOE_NUM_THREADS', '')
  const backend = await createBackend()
  expect(backend.threads).toBe(256)
  backend.dispose()
  vi.unstubAllEnvs()
})
