/** @file The emulator with several devices: objects of one context cannot be used while another one is current. */
import koffi from 'koffi'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { openEmulator, unbuilt } from './test-emulator.ts'

const invalidValue = 1
const invalidContext = 201
const invalidHandle = 400
const captureInvalidated = 901
const captureIsolation = 905

describe.skipIf(unbuilt)('emulated devices', () => {
  const device = openEmulator()
  beforeAll(() => device.set('devices', 2))
  afterAll(() => device.set('devices', 1))
  beforeEach(() => {
    device.use(0)
    device.reset()
  })
  afterEach(() => {
    device.use(0)
    device.reset()
  })

  const fill = (y: number, stream: number) => device.launch('moe_test_null', 1, 256, 'p', [y], { stream })

  test('a thread without a current context cannot create anything', () => {
    expect(device.call('cuCtxSetCurrent', 0)).toBe(0)
    expect(() => device.allocate(16)).toThrow(`${invalidContext}`)
    expect(() => device.stream()).toThrow(`${invalidContext}`)
    expect(device.report()).toMatch('without a context that is current on this thread')
  })

  test('kernels and streams belong to the current context', () => {
    const y = device.allocate(1024)
    const stream = device.stream()
    expect(fill(y, stream)).toBe(0)
    device.use(1)
    expect(fill(y, stream)).toBe(invalidHandle)
    expect(device.report()).toMatch(
      'moe_test_null: of device 0, on a stream of device 0, while the context of device 1 is current',
    )
    const other = device.stream()
    device.use(0)
    expect(fill(y, other)).toBe(invalidHandle)
    expect(device.report()).toMatch('of device 0, on a stream of device 1, while the context of device 0 is current')
  })

  test('an event is recorded on a stream of its own device and can be queried from any', () => {
    const [stream, event] = [device.stream(), device.event()]
    device.use(1)
    expect(device.call('cuEventRecord', device.event(), stream)).toBe(invalidHandle)
    expect(device.report()).toMatch('an event of device 1 on a stream of device 0')
    expect(device.call('cuEventRecord', event, stream)).toBe(0)
    device.call('cuEventQuery', event)
    expect(device.call('cuEventQuery', event)).toBe(0)
  })

  test('synchronizing waits only for work of the current context', () => {
    const [stream, event, y] = [device.stream(), device.event(), device.allocate(1024)]
    fill(y, stream)
    device.call('cuEventRecord', event, stream)
    device.use(1)
    expect(device.synchronize()).toBe(0)
    expect(device.call('cuEventQuery', event)).not.toBe(0)
    expect(device.call('cuEventQuery', event)).toBe(0)
  })

  test('overlapping copies are rejected', () => {
    const [stream, x] = [device.stream(), device.upload(new Float32Array(64))]
    const copy = (to: number, bytes: number) => device.call('cuMemcpyDtoDAsync_v2', to, x, bytes, stream)
    expect(copy(x + 128, 128)).toBe(0)
    expect(copy(x + 124, 128)).toBe(invalidValue)
    expect(copy(x, 128)).toBe(invalidValue)
    expect(device.report()).toMatch(/cuMemcpyDtoDAsync: 128 bytes from 0x\w+ to 0x\w+, which overlap/)
  })

  test('a stream that is being captured cannot wait for work outside of the capture', () => {
    const [stream, other, event] = [device.stream(), device.stream(), device.event()]
    device.call('cuEventRecord', event, other)
    expect(device.call('cuStreamBeginCapture_v2', stream, 2)).toBe(0)
    expect(device.call('cuStreamWaitEvent', stream, event, 0)).toBe(captureIsolation)
    expect(device.report()).toMatch('an event that was recorded outside of the capture')
    const graph = new BigUint64Array(1)
    expect(device.call('cuStreamEndCapture', stream, Number(koffi.address(graph)))).toBe(captureInvalidated)
  })
})
