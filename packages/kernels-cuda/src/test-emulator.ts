/** @file For tests of the emulator: uses its library directly as a driver, without the rest of the package. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import koffi from 'koffi'

/** Built from kernels compiled by the host's compiler, or by nvcc: see test-backend.ts. */
const folder = process.env['MOE_EMULATOR_KERNELS'] === 'ptx' ? 'emulator-ptx' : 'emulator'
const file = join(import.meta.dirname, '..', 'build', folder, 'libmoe-cuda-emulator.so')

/** Whether the emulator has not been built. */
export const unbuilt = !existsSync(file)

type Shape3 = number | readonly [number, number, number]

/** The library through koffi: calls by name, addresses and handles as numbers. Do not use it if the emulator has not been built. */
export function openEmulator() {
  if (unbuilt) return undefined as never
  const library = koffi.load(file)
  const functions = new Map<string, (...args: number[]) => number>()
  const words = new Map<string, string>([
    ['cuMemcpyHtoD_v2', 'llz'],
    ['cuMemcpyHtoDAsync_v2', 'llzl'],
    ['cuMemcpyDtoHAsync_v2', 'llzl'],
    ['cuMemcpyDtoDAsync_v2', 'llzl'],
    ['cuStreamBeginCapture_v2', 'li'],
    ['cuStreamWaitEvent', 'lli'],
    ['cuDevicePrimaryCtxRetain', 'li'],
    ['cuStreamCreate', 'li'],
    ['cuEventCreate', 'li'],
    ['cuInit', 'i'],
    ['cuMemHostAlloc', 'lzi'],
    ['cuFuncSetAttribute', 'lii'],
    ['cuLaunchKernel', 'liiiiiiilll'],
    ['cuTensorMapEncodeTiled', 'liillllliiii'],
  ])
  const types: Record<string, string> = { l: 'uint64_t', z: 'size_t', i: 'int' }
  /** Parameters are 64 bits wide unless listed. */
  const call = (name: string, ...args: number[]): number => {
    let found = functions.get(name)
    if (found === undefined) {
      const list = [...(words.get(name) ?? 'l'.repeat(args.length))]
        .map((letter, i) => `${types[letter]} a${i}`)
        .join(', ')
      found = library.func(`int ${name}(${list || 'void'})`) as unknown as (...args: number[]) => number
      functions.set(name, found)
    }
    return found(...args)
  }
  const check = (status: number, what: string) => {
    if (status !== 0) throw new Error(`${what}: ${status}`)
  }
  const word = new BigUint64Array(2)
  const at = (array: ArrayBufferView) => Number(koffi.address(array as never))
  const out = (name: string, ...rest: number[]) => {
    check(call(name, at(word), ...rest), name)
    return Number(word[0])
  }
  const loadModule = (image: Uint8Array) => call('cuModuleLoadData', at(word), at(image))

  check(call('cuInit', 0), 'cuInit')
  const contexts = new Map<number, number>()
  /** Makes a device's context current. */
  const use = (ordinal: number) => {
    const context = contexts.get(ordinal) ?? out('cuDevicePrimaryCtxRetain', ordinal)
    contexts.set(ordinal, context)
    check(call('cuCtxSetCurrent', context), 'cuCtxSetCurrent')
  }
  use(0)
  check(loadModule(Buffer.from('moe-emulated-module emulator-tests\n\0')), 'module')
  const module = Number(word[0])
  const functionOf = (name: string) => {
    const text = Buffer.from(`${name}\0`)
    check(call('cuModuleGetFunction', at(word), module, at(text)), name)
    return Number(word[0])
  }

  return {
    call,
    use,
    loadModule,
    report: library.func('const char* moe_emulator_report()') as unknown as () => string,
    reset: library.func('void moe_emulator_reset()') as unknown as () => void,
    kernels: library.func('const char* moe_emulator_kernels()') as unknown as () => string,
    fail: library.func('void moe_emulator_fail(const char* call, int after, int status)') as unknown as (
      call: string,
      after: number,
      status: number,
    ) => void,
    set: library.func('void moe_emulator_set(const char* name, int value)') as unknown as (
      name: string,
      value: number,
    ) => void,
    synchronize: () => call('cuCtxSynchronize'),
    allocate: (bytes: number, stream?: number) =>
      stream === undefined ? out('cuMemAlloc_v2', bytes) : out('cuMemAllocAsync', bytes, stream),
    free: (pointer: number) => check(call('cuMemFree_v2', pointer), 'free'),
    memory: () => {
      check(call('cuMemGetInfo_v2', at(word), at(word.subarray(1))), 'memory')
      return { free: Number(word[0]), total: Number(word[1]) }
    },
    stream: () => out('cuStreamCreate', 1),
    event: () => out('cuEventCreate', 0),
    pinned: (bytes: number) => {
      const address = out('cuMemHostAlloc', bytes, 0)
      const view = () => new Float32Array(koffi.view(BigInt(address), bytes))
      view().fill(0)
      return { address, view }
    },
    upload(values: Float32Array | Int32Array) {
      const pointer = out('cuMemAlloc_v2', values.byteLength)
      check(call('cuMemcpyHtoD_v2', pointer, at(values), values.byteLength), 'upload')
      return pointer
    },
    download<T extends Float32Array | Int32Array>(pointer: number, type: new (n: number) => T, n: number): T {
      const values = new type(n)
      check(call('cuMemcpyDtoH_v2', at(values), pointer, values.byteLength), 'download')
      return values
    },
    allowShared: (name: string, bytes: number) => call('cuFuncSetAttribute', functionOf(name), 8, bytes),
    launch(
      name: string,
      grid: Shape3,
      block: Shape3,
      signature: string,
      args: ReadonlyArray<number | Uint8Array>,
      { shared = 0, stream = 0 } = {},
    ): number {
      const packed = new DataView(new ArrayBuffer(512))
      let bytes = 0
      signature.split(' ').forEach((letter, i) => {
        const value = args[i]
        if (typeof value !== 'number') {
          bytes = Math.ceil(bytes / 128) * 128
          new Uint8Array(packed.buffer).set(value, bytes)
          bytes += value.length
          return
        }
        const size = letter === 'p' || letter === 'l' ? 8 : 4
        bytes = Math.ceil(bytes / size) * size
        if (size === 8) packed.setBigInt64(bytes, BigInt(value), true)
        else if (letter === 'i') packed.setInt32(bytes, value, true)
        else packed.setFloat32(bytes, value, true)
        bytes += size
      })
      const size = BigUint64Array.of(BigInt(bytes))
      const extra = BigUint64Array.of(1n, BigInt(at(packed)), 2n, BigInt(at(size)), 0n)
      const shape = (s: Shape3) => (typeof s === 'number' ? [s, 1, 1] : s)
      return call('cuLaunchKernel', functionOf(name), ...shape(grid), ...shape(block), shared, stream, 0, at(extra))
    },
  }
}
