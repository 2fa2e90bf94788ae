import * as tf from '@tensorflow/tfjs-core'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { createBackend } from './create-backend.ts'

/** Warnings of this package; TensorFlow.js prints its own. */
let warnings: string[]

beforeEach(() => {
  warnings = []
  vi.spyOn(console, 'warn').mockImplementation((text: unknown) => {
    if (String(text).startsWith('@moe')) warnings.push(String(text))
  })
  tf.registerBackend('wasm', () => Promise.reject(new Error('no wasm here')), 1)
  vi.doMock('@tensorflow/tfjs-backend-wasm', () => ({}))
})

afterEach(() => {
  tf.removeBackend('wasm')
  vi.restoreAllMocks()
})

test('if wasm does not start, createBackend falls back to plain JavaScript and prints a warning', async () => {
  const backend = await createBackend()
  expect(backend.name).toBe('tfjs-cpu')
  expect(warnings).toHaveLength(1)
  expect(warnings[0]).toMatch(/plain JavaScript.*the wasm module failed to start.*wasmPaths/)
})

test('with onFallback, it reports the reason there instead', async () => {
  const reasons: string[] = []
  const backend = await createBackend({ onFallback: reason => reasons.push(reason) })
  expect(backend.name).toBe('tfjs-cpu')
  expect(reasons).toHaveLength(1)
  expect(reasons[0]).toContain('wasm')
  expect(warnings).toEqual([])
})
