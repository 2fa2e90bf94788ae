import { graphSuite } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { createBackend } from './backend.ts'
import { profile, startProfile, stopProfile } from './profile.ts'

describe.each([false, true])('guarded %s', guarded => {
  for (const check of graphSuite(() => createBackend({ guarded }))) test(check.name, () => check.run())
})

test('a profiled replay counts its kernels', async () => {
  const backend = await createBackend()
  const handle = backend.upload(Float32Array.of(1, 2), [2], 'f32')
  const spec = { shape: [2], dtype: 'f32' } as const
  const negate = () => backend.primitives.unary([{ handle, ...spec }], { code: 'neg' }, [spec])
  backend.free(negate()[0])
  const graph = backend.capture(negate)
  startProfile()
  graph.replay()
  graph.replay()
  stopProfile()
  expect(graph.nodes).toBe(1)
  expect(profile().map(({ calls }) => calls)).toEqual([2])
  backend.dispose()
})
