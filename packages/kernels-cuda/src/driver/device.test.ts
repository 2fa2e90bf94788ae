import { afterEach, describe, expect, test } from 'vitest'
import { FakeDriver } from '../test-driver.ts'
import { attribute, findDevice } from './device.ts'

/** A driver with devices of these compute capabilities. */
function driverOf(...capabilities: number[]) {
  const fake = new FakeDriver()
  const write = (value: number) => (word: unknown) => {
    ;(word as BigUint64Array)[0] = BigInt(value)
    return 0
  }
  fake.on('cuInit', () => 0)
  fake.on('cuDriverGetVersion', write(13000))
  fake.on('cuDeviceGetCount', write(capabilities.length))
  fake.on('cuDeviceGet', (word, ordinal) => write(100 + (ordinal as number))(word))
  fake.on('cuDeviceGetName', (name, length, device) => {
    const bytes = new TextEncoder().encode(`GPU ${(device as number) - 100}`)
    // After the name there is whatever was there before.
    ;(name as Uint8Array).fill(65, 0, length as number).set([...bytes, 0])
    return 0
  })
  fake.on('cuDeviceTotalMem', write(2 ** 37))
  fake.on('cuDeviceGetAttribute', (word, code, device) => {
    const capability = capabilities[(device as number) - 100]
    const values: Record<number, number> = {
      [attribute.major]: Math.floor(capability / 10),
      [attribute.minor]: capability % 10,
      [attribute.multiprocessors]: 132,
      [attribute.sharedMemoryOptIn]: 232448,
      [attribute.usesHostPageTables]: 1,
    }
    return write(values[code as number])(word)
  })
  return fake
}

const failing = (code: string, message: RegExp) =>
  expect.objectContaining({ code, message: expect.stringMatching(message) })

describe('findDevice', () => {
  afterEach(() => {
    delete process.env['MOE_CUDA_MULTIPROCESSORS']
  })

  test('chooses the first supported device and reads its properties', () => {
    delete process.env['MOE_CUDA_MULTIPROCESSORS']
    expect(findDevice(driverOf(75, 89, 90).driver, undefined)).toEqual({
      ordinal: 1,
      name: 'GPU 1',
      capability: 89,
      multiprocessors: 132,
      sharedMemory: 232448,
      totalMemory: 2 ** 37,
      readsHostMemory: true,
      driverVersion: 13000,
    })
    expect(findDevice(driverOf(80, 90).driver, undefined).ordinal).toBe(0)
    process.env['MOE_CUDA_MULTIPROCESSORS'] = '4'
    expect(findDevice(driverOf(90, 90).driver, 1)).toMatchObject({ ordinal: 1, multiprocessors: 4 })
  })

  test('refuses devices that are too old, missing, or not there', () => {
    const old = /^kernels-cuda: GPU 0 has compute capability 7\.0, GPU 1 has compute capability 7\.5, but 8\.0/
    expect(() => findDevice(driverOf(70, 75).driver, undefined)).toThrow(failing('E_NO_BACKEND', old))
    expect(() => findDevice(driverOf(75, 80).driver, 0)).toThrow(
      failing('E_NO_BACKEND', /: GPU 0 has .* 7\.5, but 8\.0/),
    )
    expect(() => findDevice(driverOf().driver, undefined)).toThrow(failing('E_NO_BACKEND', /no device; .*nvidia-smi/))
    for (const ordinal of [-1, 2, 0.5])
      expect(() => findDevice(driverOf(80, 80).driver, ordinal)).toThrow(failing('E_CONFIG', /expected 0 to 1/))
  })

  test.each([
    [100, /no device; .*CUDA_VISIBLE_DEVICES/],
    [803, /\(803\); the driver and its kernel module differ/],
    [1, /\(1\); check that `nvidia-smi` works/],
  ])('reports that the driver fails to initialize with status %i', (status, message) => {
    const fake = driverOf(80)
    fake.failures.set('cuInit', status)
    expect(() => findDevice(fake.driver, undefined)).toThrow(failing('E_NO_BACKEND', message))
  })
})
