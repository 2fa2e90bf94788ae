import { firstAvailable, full } from '@moe/core'
import * as tf from '@tensorflow/tfjs-core'
import '@tensorflow/tfjs-backend-cpu'
import { expect, test } from 'vitest'
import { createBackend } from './create-backend.ts'

test('firstAvailable selects wasm, which computes correctly', async () => {
  const backend = await firstAvailable([() => import('./index.ts')])
  expect(backend.name).toBe('tfjs-wasm')
  const x = full([2, 3], 2, { backend })
  const y = x.matmul(x, { transposeB: true })
  expect(await y.values()).toEqual(Float32Array.of(12, 12, 12, 12))
  x.dispose()
  y.dispose()
})

test('createBackend does not change the current backend of TensorFlow.js', async () => {
  await tf.setBackend('cpu')
  const backend = await createBackend()
  expect(backend.name).toBe('tfjs-wasm')
  expect(tf.getBackend()).toBe('cpu')
})
