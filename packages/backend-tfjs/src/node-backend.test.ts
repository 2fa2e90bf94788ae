import util from 'node:util'
import { isMoeError, type MoeError, tensor } from '@moe/core'
import * as tf from '@tensorflow/tfjs-core'
import '@tensorflow/tfjs-backend-cpu'
import { beforeAll, beforeEach, expect, test } from 'vitest'
import { createNodeBackend } from './node-backend.ts'

/** The device of a substitute for tfjs-node: plain JavaScript kernels under the name `tensorflow`. Tests set it. */
const device = { isUsingGpuDevice: false }

const substitute = () => Object.assign(tf.findBackendFactory('cpu')() as tf.KernelBackend, device, { firstUse: false })

beforeAll(() => tf.copyRegisteredKernels('cpu', 'tensorflow'))

beforeEach(() => {
  if (tf.findBackendFactory('tensorflow') !== null) tf.removeBackend('tensorflow')
  tf.registerBackend('tensorflow', substitute, 3)
})

const load = async () => {
  await tf.setBackend('tensorflow')
  return tf
}

async function rejection(promise: Promise<unknown>): Promise<MoeError> {
  try {
    await promise
  } catch (error) {
    if (isMoeError(error)) return error
    throw error
  }
  throw new Error('it was accepted')
}

test('a missing package is E_NO_BACKEND with the command that installs it', async () => {
  const missing = Object.assign(new Error("Cannot find package '@tensorflow/tfjs-node-gpu'"), {
    code: 'ERR_MODULE_NOT_FOUND',
  })
  const error = await rejection(createNodeBackend({ gpu: true, load: () => Promise.reject(missing) }))
  expect(error.code).toBe('E_NO_BACKEND')
  expect(error.message).toContain('not installed')
  expect(error.message).toContain('npm install @tensorflow/tfjs-node-gpu')
})

test('a package without its native part is E_NO_BACKEND with the reason', async () => {
  const broken = new Error('The Node.js native addon module (tfjs_binding.node) can not be found')
  const error = await rejection(createNodeBackend({ load: () => Promise.reject(broken) }))
  expect(error.code).toBe('E_NO_BACKEND')
  expect(error.message).toContain('tfjs_binding.node')
  expect(error.cause).toBe(broken)
})

test('requesting a GPU is an error if TensorFlow silently uses the CPU', async () => {
  device.isUsingGpuDevice = false
  const error = await rejection(createNodeBackend({ gpu: true, load }))
  expect(error.code).toBe('E_UNSUPPORTED')
  for (const hint of ['CUDA_VISIBLE_DEVICES', 'driver', 'CUDA 11.2', 'cuDNN 8.1']) expect(error.message).toContain(hint)
})

test('a package that selects another backend is rejected', async () => {
  const cpu = async () => {
    await tf.setBackend('cpu')
    return tf
  }
  expect((await rejection(createNodeBackend({ load: cpu }))).code).toBe('E_UNSUPPORTED')
})

test('functions that Node 23 removed from node:util are restored before the package loads', async () => {
  const legacy = util as unknown as { isNullOrUndefined?: (value: unknown) => boolean }
  const original = legacy.isNullOrUndefined
  legacy.isNullOrUndefined = undefined
  const results: unknown[] = []
  await createNodeBackend({
    load: () => {
      results.push(legacy.isNullOrUndefined?.(null), legacy.isNullOrUndefined?.(0))
      return load()
    },
  })
  legacy.isNullOrUndefined = original
  expect(results).toEqual([true, false])
})

test('products stay f32 on a GPU unless TF32 is allowed', async () => {
  device.isUsingGpuDevice = true
  Reflect.deleteProperty(process.env, 'NVIDIA_TF32_OVERRIDE')
  await createNodeBackend({ gpu: true, tf32: true, load })
  expect(process.env['NVIDIA_TF32_OVERRIDE']).toBeUndefined()
  const backend = await createNodeBackend({ gpu: true, load })
  expect(process.env['NVIDIA_TF32_OVERRIDE']).toBe('0')
  expect(backend).toMatchObject({ name: 'tfjs-tensorflow', device: 'TensorFlow on a GPU' })
  Reflect.deleteProperty(process.env, 'NVIDIA_TF32_OVERRIDE')
})

test('an op on a backend that is no longer current is an error', async () => {
  const backend = await createNodeBackend({ load })
  const x = tensor([1, 2], [2], { backend })
  await tf.setBackend('cpu')
  expect(() => x.exp()).toThrow(expect.objectContaining({ code: 'E_BACKEND' }))
  await tf.setBackend('tensorflow')
  const y = x.add(1)
  expect(await y.values()).toEqual(Float32Array.of(2, 3))
  x.dispose()
  y.dispose()
})
