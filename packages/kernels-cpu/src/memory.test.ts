import { isMoeError, Random, setRows, type TensorSpec, tensor, type Value } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { createBackend } from './index.ts'
import type { CpuBuffer } from './memory.ts'
import { testBackend } from './test-backend.ts'

const f32 = (...shape: number[]): TensorSpec => ({ shape, dtype: 'f32' })
const add = { code: 'add' } as const

function codeOf(action: () => unknown): string {
  try {
    action()
  } catch (error) {
    if (isMoeError(error)) return error.code
    throw error
  }
  return 'nothing thrown'
}

describe('memory', () => {
  test('freed blocks are aligned, reused, and returned to the system by trim', async () => {
    const backend = await createBackend()
    const first = backend.upload(new Float32Array(1000), [1000], 'f32') as CpuBuffer
    const { pointer } = first
    expect(pointer % 64).toBe(0)
    backend.free(first)
    expect(backend.stats()).toMatchObject({ handles: 0, bytes: 0, peakBytes: 4000, cachedBytes: 4096 })
    const second = backend.upload(new Float32Array(1001), [1001], 'f32') as CpuBuffer
    expect(second.pointer).toBe(pointer)
    expect(backend.stats()).toMatchObject({ handles: 1, bytes: 4004, cachedBytes: 0 })
    backend.free(second)
    backend.trim()
    expect(backend.stats()).toMatchObject({ handles: 0, cachedBytes: 0 })
    backend.dispose()
  })

  test('blocks of every size keep their contents while others are allocated and freed', async () => {
    const backend = await createBackend()
    const random = new Random(5)
    const inUse: { buffer: CpuBuffer; mark: number }[] = []
    const check = async ({ buffer, mark }: { buffer: CpuBuffer; mark: number }) => {
      expect(buffer.pointer % 64).toBe(0)
      const content = (await backend.download({ handle: buffer, shape: [buffer.bytes], dtype: 'u8' })) as Uint8Array
      expect(content.every(byte => byte === mark)).toBe(true)
    }
    for (let i = 0; i < 150; i++) {
      // From 4 KiB to 4 MiB: below, within and above the sizes that share huge pages.
      const bytes = Math.round(4096 * 2 ** (10 * random.next()))
      const buffer = backend.upload(new Uint8Array(bytes).fill(i % 251), [bytes], 'u8') as CpuBuffer
      inUse.push({ buffer, mark: i % 251 })
      while (inUse.length > 0 && (inUse.length > 40 || random.next() < 0.3)) {
        const [removed] = inUse.splice(random.integer(inUse.length), 1)
        await check(removed)
        backend.free(removed.buffer)
      }
      // With nothing cached, blocks are returned to where they came from.
      if (i % 3 === 0) backend.trim()
    }
    for (const one of inUse) {
      await check(one)
      backend.free(one.buffer)
    }
    backend.trim()
    expect(backend.stats()).toMatchObject({ handles: 0, bytes: 0, cachedBytes: 0 })
    backend.dispose()
  })

  test('a size class is large enough for every size in it', async () => {
    const backend = await testBackend({ guarded: false })
    for (const size of [
      0,
      1,
      63,
      64,
      65,
      1023,
      1024,
      1025,
      1279,
      1280,
      1281,
      4095,
      4097,
      70_001,
      2 ** 20 + 1,
      5 * 2 ** 20 - 1,
    ]) {
      const before = backend.stats().cachedBytes
      const buffer = backend.upload(new Uint8Array(size), [size], 'u8')
      backend.free(buffer)
      const grown = backend.stats().cachedBytes - before
      expect(grown === 0 || grown >= size, `${size} in ${grown}`).toBe(true)
      expect(grown).toBeLessThanOrEqual(Math.max(64, size * 1.25 + 64))
      backend.trim()
    }
    backend.dispose()
  })

  test('exceeding the limit is E_OUT_OF_MEMORY, releases the outputs of the failed op, and leaves the backend usable', async () => {
    const backend = await createBackend({ memoryLimit: 10_000 })
    const x: Value = { handle: backend.upload(new Float32Array(1000), [1000], 'f32'), ...f32(1000) }
    const indices: TensorSpec = { shape: [1000], dtype: 'i32' }
    // The first output fits, the second does not.
    expect(codeOf(() => backend.primitives.topk([x], { k: 1000 }, [f32(1000), indices]))).toBe('E_OUT_OF_MEMORY')
    expect(backend.stats()).toMatchObject({ handles: 1, bytes: 4000 })
    const [y] = backend.primitives.binary([x, x], add, [f32(1000)])
    expect(backend.stats()).toMatchObject({ handles: 2, bytes: 8000, peakBytes: 8000 })
    backend.free(y)
    backend.dispose()
  })

  test('a limit that is not a number of bytes is E_CONFIG', async () => {
    for (const memoryLimit of [Number.NaN, -1, '1 GB' as never])
      await expect(createBackend({ memoryLimit })).rejects.toMatchObject({ code: 'E_CONFIG' })
  })

  test('a size that cannot be allocated is an error, not a crash', async () => {
    const backend = await createBackend()
    for (const shape of [[2 ** 50], [2 ** 40, 2 ** 40], new Array<number>(40).fill(2 ** 40)])
      expect(codeOf(() => backend.primitives.fill([], { value: 0 }, [f32(...shape)]))).toBe('E_OUT_OF_MEMORY')
    expect(backend.stats()).toMatchObject({ handles: 0, bytes: 0 })
    backend.dispose()
  })

  test('freeing a handle twice is an error', async () => {
    const backend = await createBackend()
    const handle = backend.upload(new Float32Array(4), [4], 'f32')
    backend.free(handle)
    expect(codeOf(() => backend.free(handle))).toBe('E_DISPOSED')
    backend.dispose()
  })

  test('a donated tensor is changed in place only while it has no other owner', async () => {
    const backend = await createBackend()
    const x: Value = { handle: backend.upload(Float32Array.of(1, 2, 3), [3], 'f32'), ...f32(3) }
    const index: Value = { handle: backend.upload(Int32Array.of(1), [1], 'i32'), shape: [1], dtype: 'i32' }
    const source: Value = { handle: backend.upload(Float32Array.of(9), [1], 'f32'), ...f32(1) }
    const [alias] = backend.primitives.reshape([x], {}, [f32(1, 3)])
    const [copy] = backend.primitives.setRows([x, index, source], { donate: true }, [f32(3)])
    expect((copy as CpuBuffer).pointer).not.toBe((x.handle as CpuBuffer).pointer)
    expect(await backend.download(x)).toEqual(Float32Array.of(1, 2, 3))
    backend.free(alias)
    const [same] = backend.primitives.setRows([x, index, source], { donate: true }, [f32(3)])
    expect((same as CpuBuffer).pointer).toBe((x.handle as CpuBuffer).pointer)
    backend.free(x.handle)
    expect(await backend.download({ handle: same, ...f32(3) })).toEqual(Float32Array.of(1, 9, 3))
    for (const handle of [copy, same, index.handle, source.handle]) backend.free(handle)
    expect(backend.stats().handles).toBe(0)
    backend.dispose()
  })

  test('setRows does not donate a tensor that it also reads', async () => {
    const backend = await createBackend()
    const x = tensor([1, 2], [2, 1], { backend })
    const y = setRows(x, tensor(Int32Array.of(1, 0), [2], { backend }), x, { donate: true })
    expect(await y.values()).toEqual(Float32Array.of(2, 1))
    const index = tensor(Int32Array.of(2, 0, 1), [3], { backend })
    const inverse = setRows(index, index, tensor(Int32Array.of(0, 1, 2), [3], { backend }), { donate: true })
    expect(await inverse.values()).toEqual(Int32Array.of(1, 2, 0))
    backend.dispose()
  })

  test('guards detect writes outside a buffer, and outputs start as NaN', async () => {
    const backend = await testBackend()
    backend.checkGuards()
    const short = backend.upload(new Float32Array(9), [9], 'f32')
    expect(await backend.download({ handle: short, ...f32(9) })).toEqual(new Float32Array(9))
    // Calls a kernel with a shape that is larger than the buffer.
    const tooLong: Value = { handle: short, ...f32(10) }
    const index: Value = { handle: backend.upload(Int32Array.of(9), [1], 'i32'), shape: [1], dtype: 'i32' }
    const one: Value = { handle: backend.upload(Float32Array.of(5), [1], 'f32'), ...f32(1) }
    backend.primitives.setRows([tooLong, index, one], { donate: true }, [f32(10)])
    expect(() => backend.checkGuards()).toThrow('wrote after a buffer of 36 bytes')
  })

  test('a disposed backend throws instead of touching its memory, and tensors can still be freed', async () => {
    const backend = await createBackend()
    // Large enough to be returned to the system, so that an access would be a crash.
    const x: Value = { handle: backend.upload(new Float32Array(2 ** 22), [2 ** 22], 'f32'), ...f32(2 ** 22) }
    const graph = backend.capture(() => backend.primitives.unary([x], { code: 'neg' }, [x]))
    backend.dispose()
    expect(backend.stats()).toMatchObject({ handles: 0, bytes: 0, cachedBytes: 0 })
    expect(codeOf(() => backend.upload(new Float32Array(4), [4], 'f32'))).toBe('E_DISPOSED')
    await expect(backend.download(x)).rejects.toMatchObject({ code: 'E_DISPOSED' })
    expect(codeOf(() => backend.write(x, new Float32Array(2 ** 22)))).toBe('E_DISPOSED')
    expect(codeOf(() => backend.primitives.reshape([x], {}, [x]))).toBe('E_DISPOSED')
    expect(codeOf(() => graph.replay())).toBe('E_DISPOSED')
    graph.dispose()
    for (const handle of [x.handle, ...graph.result]) backend.free(handle)
    expect(backend.stats()).toMatchObject({ handles: 0, bytes: 0, cachedBytes: 0 })
  })
})
