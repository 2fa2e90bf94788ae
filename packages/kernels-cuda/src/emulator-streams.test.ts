/** @file The emulator's streams, events, graphs and allocations, through the driver API. */
import koffi from 'koffi'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { openEmulator, unbuilt } from './test-emulator.ts'

const notReady = 600
const illegalAddress = 700

describe.skipIf(unbuilt)('emulator', () => {
  const device = openEmulator()
  beforeEach(() => device.reset())
  afterEach(() => device.reset())

  const numbers = (n: number, f = (i: number) => i) => Float32Array.from({ length: n }, (_, i) => f(i))

  describe('streams', () => {
    test('work runs at the second query of an event, not before', () => {
      const stream = device.stream()
      const event = device.event()
      const y = device.allocate(1024)
      const pinned = device.pinned(1024)
      device.launch('moe_test_null', 1, 256, 'p', [y], { stream })
      expect(device.call('cuMemcpyDtoHAsync_v2', pinned.address, y, 1024, stream)).toBe(0)
      device.call('cuEventRecord', event, stream)
      expect(device.call('cuEventQuery', event)).toBe(notReady)
      expect(pinned.view()[0]).toBe(0)
      expect(device.call('cuEventQuery', event)).toBe(0)
      expect(pinned.view()[0]).toBe(1)
      expect(device.call('cuEventQuery', event)).toBe(0)
    })

    test('pageable memory is read at the call, pinned memory when the copy runs', () => {
      const stream = device.stream()
      const [a, b] = [device.allocate(4), device.allocate(4)]
      const host = numbers(1, () => 1)
      const pinned = device.pinned(4)
      pinned.view()[0] = 1
      device.call('cuMemcpyHtoDAsync_v2', a, Number(koffi.address(host)), 4, stream)
      device.call('cuMemcpyHtoDAsync_v2', b, pinned.address, 4, stream)
      host[0] = 2
      pinned.view()[0] = 2
      expect(device.call('cuStreamSynchronize', stream)).toBe(0)
      expect(device.download(a, Float32Array, 1)[0]).toBe(1)
      expect(device.download(b, Float32Array, 1)[0]).toBe(2)
    })

    test('work sees results of another stream only if its stream waits for an event', () => {
      const [one, two] = [device.stream(), device.stream()]
      const event = device.event()
      const y = device.allocate(1024)
      const z = device.allocate(1024)
      device.launch('moe_test_null', 1, 256, 'p', [y], { stream: one })
      device.call('cuEventRecord', event, one)
      device.call('cuStreamWaitEvent', two, event, 0)
      device.launch('moe_test_copy', 1, 256, 'p p l', [z, y, 256], { stream: two })
      expect(device.call('cuStreamSynchronize', two)).toBe(0)
      const [x, w] = [device.allocate(1024), device.allocate(1024)]
      device.launch('moe_test_null', 1, 256, 'p', [x], { stream: one })
      device.launch('moe_test_copy', 1, 256, 'p p l', [w, x, 256], { stream: two })
      expect(device.call('cuStreamSynchronize', two)).toBe(illegalAddress)
      expect(device.report()).toMatch('uninitialized')
    })

    test('memory is allocated and freed in stream order', () => {
      const stream = device.stream()
      const y = device.allocate(1024, stream)
      device.launch('moe_test_null', 1, 256, 'p', [y], { stream })
      expect(device.call('cuMemFreeAsync', y, stream)).toBe(0)
      expect(device.call('cuStreamSynchronize', stream)).toBe(0)
      device.launch('moe_test_null', 1, 256, 'p', [y], { stream })
      expect(device.call('cuStreamSynchronize', stream)).toBe(illegalAddress)
    })

    test('events measure elapsed time', () => {
      const [start, end] = [device.event(), device.event()]
      const x = device.upload(numbers(1 << 16))
      const y = device.allocate(4 << 16)
      device.call('cuEventRecord', start, 0)
      device.launch('moe_test_copy', 64, 256, 'p p l', [y, x, 1 << 16])
      device.call('cuEventRecord', end, 0)
      const milliseconds = new Float32Array(1)
      expect(device.call('cuEventElapsedTime', Number(koffi.address(milliseconds)), start, end)).toBe(notReady)
      device.synchronize()
      expect(device.call('cuEventElapsedTime', Number(koffi.address(milliseconds)), start, end)).toBe(0)
      expect(milliseconds[0]).toBeGreaterThan(0)
    })

    test('memory is limited, and everything can be freed', () => {
      const before = device.memory()
      expect(() => device.allocate(before.total + 1)).toThrow('2')
      const part = device.allocate(2 ** 20)
      expect(device.memory().free).toBe(before.free - 2 ** 20)
      device.free(part)
      expect(device.memory()).toEqual(before)
    })
  })

  describe('graphs', () => {
    const capture = (stream: number, fn: () => void) => {
      const word = new BigUint64Array(1)
      expect(device.call('cuStreamBeginCapture_v2', stream, 2)).toBe(0)
      fn()
      const status = device.call('cuStreamEndCapture', stream, Number(koffi.address(word)))
      return { status, graph: Number(word[0]) }
    }
    const out = (call: (address: number) => number) => {
      const word = new BigUint64Array(1)
      expect(call(Number(koffi.address(word)))).toBe(0)
      return Number(word[0])
    }

    test('a captured launch runs at every replay, with the current contents of its inputs', () => {
      const stream = device.stream()
      const x = device.upload(numbers(256))
      const [y, z] = [device.allocate(1024), device.allocate(1024)]
      const { status, graph } = capture(stream, () => {
        device.launch('moe_test_copy', 1, 256, 'p p l', [y, x, 256], { stream })
        device.call('cuMemcpyDtoDAsync_v2', z, y, 1024, stream)
      })
      expect(status).toBe(0)
      const exec = out(address => device.call('cuGraphInstantiateWithFlags', address, graph, 0))
      expect(out(address => device.call('cuGraphGetNodes', graph, 0, address))).toBe(2)
      for (const scale of [1, 2]) {
        device.call('cuMemcpyHtoD_v2', x, Number(koffi.address(numbers(256, i => scale * i))), 1024)
        expect(device.call('cuGraphLaunch', exec, stream)).toBe(0)
        expect(device.call('cuStreamSynchronize', stream)).toBe(0)
        expect(device.download(z, Float32Array, 256)[255]).toBe(scale * 255)
      }
      expect(device.call('cuGraphExecDestroy', exec)).toBe(0)
      expect(device.call('cuGraphDestroy', graph)).toBe(0)
      expect(device.report()).toBe('')
    })

    test('parameters of a captured launch can be replaced', () => {
      const stream = device.stream()
      const x = device.upload(numbers(256))
      const [y, z] = [device.allocate(1024), device.allocate(1024)]
      const { graph } = capture(stream, () => device.launch('moe_test_copy', 1, 256, 'p p l', [y, x, 256], { stream }))
      const exec = out(address => device.call('cuGraphInstantiateWithFlags', address, graph, 0))
      const nodes = new BigUint64Array(1)
      const count = BigUint64Array.of(1n)
      device.call('cuGraphGetNodes', graph, Number(koffi.address(nodes)), Number(koffi.address(count)))
      // CUDA_KERNEL_NODE_PARAMS: function, grid, block, shared, kernelParams, extra, kernel, context.
      const params = new BigUint64Array(9)
      expect(device.call('cuGraphKernelNodeGetParams_v2', Number(nodes[0]), Number(koffi.address(params)))).toBe(0)
      const extra = koffi.view(params[6], 40)
      const packed = koffi.view(new BigUint64Array(extra)[1], 24)
      new BigUint64Array(packed)[0] = BigInt(z)
      expect(
        device.call('cuGraphExecKernelNodeSetParams_v2', exec, Number(nodes[0]), Number(koffi.address(params))),
      ).toBe(0)
      device.call('cuGraphLaunch', exec, stream)
      expect(device.call('cuStreamSynchronize', stream)).toBe(0)
      expect(device.download(z, Float32Array, 256)[255]).toBe(255)
      expect(() => device.download(y, Float32Array, 256)).toThrow('700')
    })

    test('calls that wait for the device are not permitted during a capture', () => {
      const stream = device.stream()
      const { status, graph } = capture(stream, () => expect(device.call('cuStreamSynchronize', stream)).toBe(900))
      expect({ status, graph }).toEqual({ status: 901, graph: 0 })
    })
  })
})
