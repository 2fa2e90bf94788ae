/** @file Backends on several devices in one process, and uploads while a device is busy. */
import { full, tensor } from '@moe/core'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { type CudaBackend, createBackend } from './backend.ts'
import { emulatedCublasLt, emulator, emulatorFunction, onDevice, resetEmulator, unavailable } from './test-backend.ts'

describe.skipIf(unavailable)('uploads', () => {
  // The emulator can be set to read host memory late (failures.test.ts). Only a real device shows whether a driver does so.
  test.each([3, 40_000, 400_000, 4_000_000])(
    'read all of %i numbers before the call returns, while the device is busy',
    async n => {
      if (!onDevice) resetEmulator()
      const backend = await createBackend(onDevice ? {} : emulator)
      const [size, repetitions] = onDevice ? [4096, 10] : [32, 2]
      const x = full([size, size], 1 / size, { backend })
      const products = Array.from({ length: repetitions }, () => x.matmul(x))
      const data = new Float32Array(n)
      const uploads = [1, 2].map(value => tensor(data.fill(value), [n], { backend }))
      data.fill(3)
      for (const [i, upload] of uploads.entries()) {
        const wrong = (await upload.values()).findIndex(value => value !== i + 1)
        expect(wrong).toBe(-1)
      }
      for (const one of [x, ...products, ...uploads]) one.dispose()
      backend.dispose()
    },
  )
})

describe.skipIf(unavailable || onDevice)('two devices', () => {
  const set = (name: string, value: number) =>
    emulatorFunction('void moe_emulator_set(const char* name, int value)')(name, value)
  const report = () => emulatorFunction('const char* moe_emulator_report()')()
  beforeAll(() => set('devices', 2))
  afterAll(() => set('devices', 1))
  afterEach(resetEmulator)
  const both = () => Promise.all([0, 1].map(device => createBackend({ ...emulator, device })))
  const doubled = (backend: CudaBackend, value: number) => full([1000], value, { backend }).mul(2)

  test('every call of a backend makes its own context current', async () => {
    const backends = await both()
    for (const [i, backend] of backends.entries()) {
      const other = () => backends[1 - i].interop.makeCurrent()
      other()
      const graph = backend.capture(() => doubled(backend, 1))
      other()
      graph.replay()
      other()
      expect(await backend.elapsed(() => graph.replay())).toBeGreaterThanOrEqual(0)
      other()
      expect((await graph.result.values())[999]).toBe(2)
      const x = doubled(backend, 2)
      other()
      backend.write(x, new Float32Array(1000).fill(9))
      other()
      await backend.trim()
      other()
      const queue = backend.interop.queue()
      other()
      queue.waitForBackend()
      other()
      await queue.synchronize()
      expect((await x.values())[0]).toBe(9)
      other()
      queue.dispose()
      graph.dispose()
    }
    for (const backend of backends) backend.dispose()
    expect(report()).toBe('')
  })

  test('pending reads, waits and timings complete if the backend of the other device is disposed', async () => {
    const [one, other] = await both()
    const x = doubled(one, 4)
    const queue = one.interop.queue()
    queue.waitForBackend()
    const pending = [x.values(), one.sync(), one.elapsed(() => x.mul(2)), one.trim(), queue.synchronize()] as const
    doubled(other, 1)
    other.dispose()
    const [values] = await Promise.all(pending)
    expect(values[0]).toBe(8)
    queue.dispose()
    one.dispose()
    expect(report()).toBe('')
  })

  test('backends that are created at the same time have handles of cuBLASLt for their own devices', async () => {
    const options = { ...emulator, cublasLt: emulatedCublasLt }
    const backends = await Promise.all([0, 1].map(device => createBackend({ ...options, device })))
    for (const backend of backends) {
      const x = full([32, 32], 0.5, { backend })
      expect((await x.matmul(x).values())[0]).toBe(8)
      backend.dispose()
    }
    expect(report()).toBe('')
  })

  test('a backend on either device outlives one on the other', async () => {
    for (const disposed of [0, 1]) {
      const backends = await both()
      backends[disposed].dispose()
      const remaining = backends[1 - disposed]
      expect((await doubled(remaining, 5).values())[0]).toBe(10)
      remaining.dispose()
    }
    expect(report()).toBe('')
  })
})
