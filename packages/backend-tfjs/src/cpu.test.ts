import * as tf from '@tensorflow/tfjs-core'
import '@tensorflow/tfjs-backend-cpu'
import { backendSuite } from '@moe/core/testing'
import { beforeAll, describe, test } from 'vitest'
import { tfjsBackend } from './tfjs-backend.ts'

beforeAll(() => tf.setBackend('cpu'))

describe('tfjs-cpu', () => {
  const make = async () => tfjsBackend(tf)
  for (const check of backendSuite(make)) test(check.name, check.run)
})

// The paths of tensorflow (sync) and of webgpu (async), on the one backend whose kernels are plain JavaScript.
for (const reads of ['sync', 'async'] as const) {
  describe(`tfjs-cpu from kernels alone, ${reads} reads`, () => {
    const make = async () => tfjsBackend(tf, { reads })
    for (const check of backendSuite(make)) test(check.name, check.run)
  })
}
