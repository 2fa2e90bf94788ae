import { graphSuite } from '@moe/core/testing'
import { test } from 'vitest'
import { testBackend, unavailable } from './test-backend.ts'

for (const check of graphSuite(() => testBackend({ guarded: false }))) {
  test.skipIf(unavailable)(check.name, () => check.run())
}
