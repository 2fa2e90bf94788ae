import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { createBackend } from './index.ts'

/** Two processors of 192 cores; and as many CPUs as this process may use. */
const machine = vi.hoisted(() => ({ cpus: 384, allowed: 384 }))
vi.mock('node:os', async original => ({
  ...(await original<typeof import('node:os')>()),
  availableParallelism: () => machine.allowed,
}))
vi.mock('./load.ts', async original => {
  const load = await original<typeof import('./load.ts')>()
  return {
    ...load,
    loadLibrary: async (...args: Parameters<typeof load.loadLibrary>) => ({
      ...(await load.loadLibrary(...args)),
      defaultThreads: machine.cpus,
    }),
  }
})

beforeEach(() => {
  vi.stubEnv('MOE_NUM_THREADS', '')
})
afterEach(() => {
  vi.unstubAllEnvs()
})

test.each([
  [384, 256, 'as many as the pool has room for'],
  [3, 3, 'as many as the control group allows'],
])('with %i CPUs allowed, the default is %i threads: %s', async (allowed, threads) => {
  machine.allowed = allowed
  const backend = await createBackend()
  expect(backend.threads).toBe(threads)
  backend.dispose()
})
