import * as tf from '@tensorflow/tfjs-core'
import '@tensorflow/tfjs-backend-wasm'
import { backendSuite } from '@moe/core/testing'
import { describe, test } from 'vitest'
import { tfjsBackend } from './tfjs-backend.ts'

describe('tfjs-wasm', () => {
  const make = async () => {
    await tf.setBackend('wasm')
    return tfjsBackend(tf)
  }
  for (const check of backendSuite(make)) test(check.name, check.run)
})
