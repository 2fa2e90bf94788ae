import * as tf from '@tensorflow/tfjs-core'
import { expect, test, vi } from 'vitest'
import { createBackend } from './create-backend.ts'

test('if wasm does not start, createBackend falls back to plain JavaScript and reports the reason', async () => {
  const warn = vi.spyOn(console, 'warn').mockImplementation(() => {})
  tf.registerBackend('wasm', () => Promise.reject(new Error('no wasm here')), 1)
  const reasons: string[] = []
  vi.doMock('@tensorflow/tfjs-backend-wasm', () => ({}))
  const backend = await createBackend({ onFallback: reason => reasons.push(reason) })
  expect(backend.name).toBe('tfjs-cpu')
  expect(reasons).toHaveLength(1)
  expect(reasons[0]).toContain('wasm')
  warn.mockRestore()
})
