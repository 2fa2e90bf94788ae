/** @file Tests of the emulated TMA copies, mbarriers and wgmma: correct uses, and every kind of error. */
import { readFileSync } from 'node:fs'
import koffi from 'koffi'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { openEmulator, unbuilt } from './test-emulator.ts'

const illegalAddress = 700
const misalignedAddress = 716
const launchFailed = 719

/** In the order of emulator/tests/hopper.cu. */
const modes = [
  'right',
  'noWait',
  'oneWarpWaits',
  'waitsForTheOther',
  'tooFewBytes',
  'noSyncthreads',
  'noFenceBarrierInit',
  'arrivesTwice',
  'arrivesForOthers',
  'misalignedStage',
  'refillsTooEarly',
  'refillsInFlight',
  'leavesABox',
  'oneThreadLess',
  'noWgmmaFence',
  'writesSums',
  'readsSums',
  'oneWarpLess',
  'noWaitProducts',
  'threadsWrite',
  'oneLaneFirst',
  'oneLaneBetween',
  'lanesMeet',
] as const
type Mode = (typeof modes)[number]

const operandModes = [
  'right',
  'noFenceProxyAsync',
  'fencesTooLate',
  'noSyncWarpgroup',
  'oneWarpElsewhere',
  'writesInFlight',
  'writesTooEarly',
  'misalignedAcross',
  'leftAcross',
  'leftRegisters',
  'registersInFlight',
] as const
type OperandMode = (typeof operandModes)[number]

describe.skipIf(unbuilt)('the emulated Hopper device', () => {
  const device = openEmulator()
  beforeEach(() => {
    device.reset()
    device.set('capability', 90)
  })
  afterEach(() => device.reset())

  const address = (array: ArrayBufferView) => Number(koffi.address(array as never))
  const room = new ArrayBuffer(256)
  const start = Math.ceil(address(new Uint8Array(room)) / 64) * 64 - address(new Uint8Array(room))
  const map = new Uint8Array(room, start, 128)

  interface Encoded {
    readonly sizes: readonly number[]
    readonly strides: readonly number[]
    readonly box: readonly number[]
    readonly swizzle: number
    readonly type: number
    readonly at: number
  }
  const encode = (
    pointer: number,
    {
      sizes = [128, 64, 1],
      strides = [256, 16384],
      box = [64, 64, 1],
      swizzle = 3,
      type = 9,
      at = address(map),
    }: Partial<Encoded> = {},
  ) => {
    const arrays = [BigUint64Array.from(sizes, BigInt), BigUint64Array.from(strides, BigInt)]
    const sides = [Uint32Array.from(box), Uint32Array.of(1, 1, 1)]
    const pointers = [...arrays, ...sides].map(address)
    return device.call('cuTensorMapEncodeTiled', at, type, sizes.length, pointer, ...pointers, 0, swizzle, 0, 0)
  }
  const encoded = (pointer: number, options: Partial<Encoded> = {}) => {
    expect(encode(pointer, options)).toBe(0)
    return map.slice()
  }

  /** Small integers, which bf16 represents exactly, two per word. */
  const matrix = (rows: number, columns: number, f: (row: number, column: number) => number) => {
    const words = new Int32Array((rows * columns) / 2)
    const halves = new Uint16Array(words.buffer)
    const bits = new Uint32Array(
      Float32Array.from({ length: rows * columns }, (_, i) => f(Math.floor(i / columns), i % columns)).buffer,
    )
    for (let i = 0; i < halves.length; i++) halves[i] = bits[i] >>> 16
    return device.upload(words)
  }
  const a = (row: number, k: number) => ((row * 7 + k * 3) % 11) - 5
  const b = (row: number, k: number) => ((row * 5 + k * 2) % 13) - 6

  /** d = a b^T over two steps of 64 from `x` on; a has 60 rows and 126 columns, with a row stride of 128. */
  const run = (mode: Mode, x = 0, values = { a, b }) => {
    const d = device.upload(new Float32Array(64 * 128))
    const left = encoded(matrix(64, 128, values.a), { sizes: [126, 60, 1] })
    const right = encoded(matrix(128, 128, values.b), {
      sizes: [126, 128, 1],
      strides: [256, 32768],
      box: [64, 128, 1],
    })
    const shared = 64 * 128 + 128 * 128 + 1024
    const args = [d, left, right, 2, x, modes.indexOf(mode)]
    const launched = device.launch('moe_test_hopper', 1, 160, 'p t t i i i', args, { shared })
    return { d, status: launched || device.synchronize(), report: device.report() }
  }

  test.each<[number, Mode]>([
    [0, 'right'],
    [-16, 'right'],
    [40, 'right'],
    [0, 'lanesMeet'],
  ])('multiplies boxes from column %i on, with zeros outside of the matrix (%s)', (x, mode) => {
    const { d, status, report } = run(mode, x)
    expect({ status, report }).toEqual({ status: 0, report: '' })
    const values = device.download(d, Float32Array, 64 * 128)
    for (let i = 0; i < 64; i++)
      for (let j = 0; j < 128; j++) {
        let sum = 0
        if (i < 60) for (let k = Math.max(x, 0); k < Math.min(x + 128, 126); k++) sum += a(i, k) * b(j, k)
        expect(values[128 * i + j]).toBe(sum)
      }
  })

  test.each([
    [0, 2 ** -12, 1], // One after the other: each square is half of the last bit of 1, and rounded away.
    [1, 2 ** -12, 1 + 7 * 2 ** -23], // 16 at a time: 15 halves of the last bit, truncated to 7 bits.
    [1, 2 ** -13, 1], // Below the bits to which all terms are aligned.
  ])('with deviceSums %i, adds 15 squares of %f to 1 with the expected rounding', (deviceSums, small, expected) => {
    const value = (_: number, k: number) => (k === 0 ? 1 : k < 16 ? small : 0)
    device.set('deviceSums', deviceSums)
    try {
      const { d, status } = run('right', 0, { a: value, b: value })
      expect(status).toBe(0)
      expect(device.download(d, Float32Array, 1)[0]).toBe(expected)
    } finally {
      device.set('deviceSums', 0)
    }
  })

  test.each<[Mode, number, string]>([
    ['noWait', launchFailed, 'while an asynchronous copy to it is in flight'],
    ['oneWarpWaits', launchFailed, 'written by the copy engine'],
    ['waitsForTheOther', launchFailed, 'while an asynchronous copy to it is in flight'],
    ['tooFewBytes', launchFailed, 'is missing 0 of 1 arrivals and -16 bytes'],
    ['noSyncthreads', launchFailed, 'initialized, without __syncthreads since'],
    ['noFenceBarrierInit', launchFailed, 'without fenceBarrierInit()'],
    ['arrivesTwice', launchFailed, 'an arrival at byte 0 of shared array barriers'],
    ['arrivesForOthers', launchFailed, 'which wgmmas of warp 1 in flight read'],
    ['misalignedStage', misalignedAddress, 'which is not a multiple of 1024'],
    ['refillsTooEarly', launchFailed, 'threads wait for each other'],
    ['refillsInFlight', launchFailed, 'which warp 0 may still read'],
    ['leavesABox', launchFailed, 'the block ends while a copy of a box'],
    ['oneThreadLess', launchFailed, 'all 128 threads must issue the same'],
    ['noWgmmaFence', launchFailed, 'without wgmmaFence()'],
    ['writesSums', launchFailed, 'accumulator 3 was written while wgmmas'],
    ['oneWarpLess', launchFailed, 'returns while its wgmmas are in flight'],
    ['noWaitProducts', launchFailed, 'returns while its wgmmas are in flight'],
    ['threadsWrite', launchFailed, 'has written without fenceProxyAsync()'],
    ['oneLaneFirst', launchFailed, 'wgmmaFence is warp-wide'],
    ['oneLaneBetween', launchFailed, 'wgmmaWait is warp-wide'],
  ])('reports a kernel with the error %s', (mode, code, text) => {
    const { status, report } = run(mode)
    expect(report).toContain(text)
    expect(status).toBe(code)
  })

  test('reports where lanes diverged and where they had to converge', () => {
    const source = readFileSync(new URL('../emulator/tests/hopper.cu', import.meta.url), 'utf8').split('\n')
    const lineOf = (text: string) => 1 + source.findIndex(line => line.includes(text))
    const { report } = run('oneLaneBetween')
    expect(report).toMatch(/^moe_test_hopper, block \(0, 0, 0\), thread .*: wgmmaWait is warp-wide, but warp 1 /)
    expect(report).toContain(
      `lane 0 comes from wait (hopper.cu:${lineOf('mode == lanesMeet) && threadIdx.x == 32')}), lane 1 does not`,
    )
    expect(report).toContain(`[hopper.cu:${lineOf('wgmmaWait<0>(sums)')}]`)
  })

  test.each([0, 1])('mma and ldmatrix require a converged warp (converges before: %i)', converges => {
    for (const [loads, name] of ['mmaBf16', 'ldmatrix4'].entries()) {
      device.reset()
      device.set('capability', 90)
      const launched = device.launch('moe_test_aligned', 1, 32, 'p i i', [device.allocate(128), loads, converges])
      expect(launched || device.synchronize()).toBe(converges ? 0 : launchFailed)
      expect(device.report()).toContain(converges ? '' : `${name} is warp-wide, but warp 0 has not converged`)
      if (!converges) expect(device.report()).toContain('lane 3 comes from wait')
    }
  })

  test('accumulators that are read while wgmmas are in flight are NaN', () => {
    const { d, status, report } = run('readsSums')
    expect({ status, report }).toEqual({ status: 0, report: '' })
    expect(device.download(d, Float32Array, 128).every(Number.isNaN)).toBe(true)
  })

  const boxes = (mode: number) => {
    const x = device.upload(Float32Array.from({ length: 64 }, (_, i) => i))
    const options = { type: 7, swizzle: 0, sizes: [32, 2, 1], strides: [128, 256], box: [32, 1, 1] }
    const y = device.upload(new Float32Array(64))
    const launched = device.launch('moe_test_boxes', 1, 64, 'p p t i', [y, x, encoded(x, options), mode])
    return { y, status: launched || device.synchronize(), report: device.report() }
  }
  test.each([0, 1, 5, 9, 11])('threads may read boxes for which they or their warp have waited (%i)', mode => {
    const { y, status, report } = boxes(mode)
    expect({ status, report }).toEqual({ status: 0, report: '' })
    expect(device.download(y, Float32Array, 64)).toEqual(Float32Array.from({ length: 64 }, (_, i) => i))
  })
  test.each([
    [2, 'written by the copy engine'],
    [3, 'read by thread 0'],
    [4, 'threads wait for each other'],
    [6, 'which must be multiples of 16'],
    [7, 'without fenceProxyAsync() before it arrived'],
    [8, 'read by thread 0 without a barrier'],
    [10, 'without fenceProxyAsync() before it arrived'],
    [12, 'which this launch has written'],
  ])('boxes that are read or overwritten too early, or misaligned, are reported (%i)', (mode, text) => {
    const { status, report } = boxes(mode)
    expect(report).toContain(text)
    expect(status).toBe(mode === 6 ? misalignedAddress : launchFailed)
  })

  const operands = (mode: OperandMode) => {
    const d = device.upload(new Float32Array(64 * 128))
    const left = matrix(64, 64, mode === 'leftAcross' ? (k, row) => a(row, k) : a)
    const args = [d, left, matrix(64, 128, b), operandModes.indexOf(mode)]
    const shared = 64 * 128 * 3 + 1024 + 128
    const launched = device.launch('moe_test_operands', 1, 128, 'p p p i', args, { shared })
    return { d, status: launched || device.synchronize(), report: device.report() }
  }
  test.each<[number, OperandMode]>([
    [0, 'right'],
    [1, 'right'],
    [0, 'leftAcross'],
    [0, 'leftRegisters'],
  ])('multiplies MN-major operands that threads have written (reversed: %i, %s)', (reversed, mode) => {
    device.set('reversed', reversed)
    const { d, status, report } = operands(mode)
    device.set('reversed', 0)
    expect({ status, report }).toEqual({ status: 0, report: '' })
    const values = device.download(d, Float32Array, 64 * 128)
    for (let i = 0; i < 64; i++)
      for (let j = 0; j < 128; j++) {
        let sum = 0
        for (let k = 0; k < 64; k++) sum += a(i, k) * b(k, j)
        expect(values[128 * i + j]).toBe(sum)
      }
  })
  test.each<[OperandMode, number, string]>([
    ['noFenceProxyAsync', launchFailed, 'has written without fenceProxyAsync()'],
    ['fencesTooLate', launchFailed, 'has written without fenceProxyAsync()'],
    ['noSyncWarpgroup', illegalAddress, 'is a barrier missing?'],
    ['oneWarpElsewhere', launchFailed, 'syncWarpgroup without all threads'],
    ['writesInFlight', launchFailed, 'a thread writes to byte'],
    ['writesTooEarly', launchFailed, 'which warp 1 may still read'],
    ['registersInFlight', launchFailed, 'an A operand in registers was written'],
    ['misalignedAcross', misalignedAddress, 'its first row is not a multiple of 1024'],
  ])('reports a kernel with the operand error %s', (mode, code, text) => {
    const { status, report } = operands(mode)
    expect(report).toContain(text)
    expect(status).toBe(code)
  })

  test('reports a parameter that is not a tensor map', () => {
    const d = device.allocate(4)
    const args = [d, new Uint8Array(128), new Uint8Array(128), 1, 0, 0]
    expect(device.launch('moe_test_hopper', 1, 160, 'p t t i i i', args, { shared: 32 << 10 })).toBe(0)
    expect(device.synchronize()).toBe(launchFailed)
    expect(device.report()).toContain('not a tensor map')
  })

  test.each<[string, Partial<Encoded> & { readonly pointer?: number }]>([
    ['multiple of 64', { at: address(map) + 32 }],
    ['address of the matrix, to be a multiple of 16', { pointer: 8 }],
    ['a size', { sizes: [64, 0, 1] }],
    ['a stride, to be a multiple of 16', { strides: [264, 16384] }],
    ['a stride, to cover', { strides: [240, 16384] }],
    ['a stride, to cover', { strides: [256, 16128] }],
    ['a stride, to cover', { strides: [256, 16400] }],
    ['a side of the box', { box: [64, 257, 1] }],
    ['to be a multiple of 16', { box: [60, 64, 1] }],
    ["at most the swizzle's", { box: [128, 64, 1] }],
    ["at most the swizzle's", { swizzle: 2 }],
    ['the data type', { type: 40 }],
    ['the swizzle', { swizzle: 9 }],
  ])('rejects the tensor maps that a driver rejects: %s', (text, { pointer = 0, ...options }) => {
    expect(encode(device.allocate(16384) + pointer, options)).toBe(1)
    expect(device.report()).toContain(text)
  })

  test.each([80, 89, 100, 120])('capability %i rejects machine code for Hopper', capability => {
    const image = Buffer.from('moe-emulated-module matmul-sm90a\n\0')
    expect(device.loadModule(image)).toBe(0)
    device.set('capability', capability)
    expect(device.loadModule(image)).toBe(209)
    if (capability > 90) return
    expect(encode(device.allocate(16384))).toBe(1)
    expect(device.report()).toContain('the compute capability')
  })
})
