import { backendSuite } from '@moe/core/testing'
import { describe, test } from 'vitest'
import { createBackend } from './index.ts'
import { availableIsas } from './test-backend.ts'

describe.each(await availableIsas())('%s', isa => {
  for (const check of backendSuite(() => createBackend({ isa, guarded: true }), {
    guards: backend => (backend as Awaited<ReturnType<typeof createBackend>>).checkGuards(),
  })) {
    test(check.name, () => check.run())
  }
})
