/** @file Copies and waits, on a driver that keeps books. */
import { describe, expect, test } from 'vitest'
import type { Context } from './driver/context.ts'
import { Stream } from './stream.ts'
import { FakeDriver } from './test-driver.ts'

const KiB = 2 ** 10
const MiB = 2 ** 20

function make(readsHostMemory = false) {
  const fake = new FakeDriver()
  const context = { use() {} } as Context
  const stream = new Stream(fake.driver, context, { readsHostMemory })
  /** Whether each upload so far came from pinned memory. */
  const staged: boolean[] = []
  fake.on('cuMemcpyHtoDAsync', (_to, from, bytes) => {
    staged.push(typeof from === 'number')
    if (typeof from === 'number') expect(fake.pinned.get(from)?.length).toBeGreaterThanOrEqual(bytes as number)
    return 0
  })
  return { fake, stream, staged }
}

describe('uploads', () => {
  test('of more than 64 KiB and at most 4 MiB are staged, 16 at once', () => {
    const { fake, stream, staged } = make()
    const upload = (bytes: number) => stream.upload(1, new Uint8Array(bytes), 'upload')
    for (const bytes of [0, 1, 64 * KiB, 64 * KiB + 1, 4 * MiB, 4 * MiB + 1]) upload(bytes)
    expect(staged).toEqual([false, false, true, true, false])
    expect(fake.waits).toEqual([])
    for (let i = 0; i < 15; i++) upload(100 * KiB)
    expect(staged.slice(5)).toEqual([...Array(14).fill(true), false])
    const pinned = fake.pinned.size
    fake.finish()
    for (let i = 0; i < 16; i++) upload(100 * KiB)
    expect(staged.slice(20)).toEqual(Array(16).fill(true))
    expect(fake.pinned.size).toBe(pinned)
    stream.dispose()
    expect([fake.pinned.size, fake.events.size]).toEqual([0, 0])
  })

  test('keep their contents until they are done, and no longer', () => {
    const { fake, stream } = make()
    stream.upload(1, new Uint8Array(100 * KiB).fill(1).subarray(0, 70 * KiB), 'upload')
    stream.upload(1, new Uint8Array(100 * KiB).fill(2), 'upload')
    const contents = () => [...fake.pinned.values()].map(bytes => bytes[70 * KiB - 1])
    expect(contents()).toEqual([1, 2])
    // Only the first is done.
    fake.finish(1)
    stream.upload(1, new Uint8Array(100 * KiB).fill(3), 'upload')
    expect(contents()).toEqual([3, 2])
  })

  test('to a device that reads host memory are staged or waited for', () => {
    const { fake, stream, staged } = make(true)
    for (const bytes of [1, 4 * MiB]) stream.upload(1, new Uint8Array(bytes), 'upload')
    expect([staged, fake.waits]).toEqual([[true, true], []])
    stream.upload(1, new Uint8Array(4 * MiB + 1), 'upload')
    expect([staged, fake.waits]).toEqual([[true, true, false], [stream.handle]])
  })
})

test('pinned memory has sizes of powers of two from 4 KiB, and more than 64 MiB is not kept', async () => {
  const { fake, stream } = make()
  fake.on('cuMemcpyDtoHAsync', () => 0)
  const sizes = async (bytes: number) => {
    const read = stream.download(1, new Uint8Array(bytes))
    fake.finish()
    await read
    return [...fake.pinned.values()].map(({ length }) => length)
  }
  expect(await sizes(1)).toEqual([4 * KiB])
  expect(await sizes(4 * KiB + 1)).toEqual([4 * KiB, 8 * KiB])
  expect(await sizes(4 * KiB)).toEqual([4 * KiB, 8 * KiB])
  expect(await sizes(64 * MiB + 1)).toEqual([4 * KiB, 8 * KiB])
  expect(await sizes(0)).toEqual([4 * KiB, 8 * KiB])
})

test('downloads fill the part of the buffer that the array views, and failed ones free their memory', async () => {
  const { fake, stream } = make()
  fake.on('cuMemcpyDtoHAsync', (to, from, bytes) => {
    expect([from, bytes]).toEqual([5, 3])
    fake.pinned.get(to as number)?.set([1, 2, 3, 4])
    return 0
  })
  const all = new Uint8Array(6)
  const read = stream.download(5, all.subarray(2, 5))
  fake.finish()
  await read
  expect([...all]).toEqual([0, 0, 1, 2, 3, 0])
  fake.failures.set('cuMemcpyDtoHAsync', 719)
  await expect(stream.download(5, all)).rejects.toMatchObject({ op: 'download', details: { lost: true } })
  expect(fake.pinned.size).toBe(1)
  stream.dispose()
  expect(fake.pinned.size).toBe(0)
})

test('launches pass the grid, one axis of threads, shared memory and the list of arguments', () => {
  const { fake, stream } = make()
  const calls: unknown[][] = []
  fake.on('cuLaunchKernel', (...args) => {
    calls.push(args)
    return 0
  })
  const launch = { kernel: 'k', function: 11, grid: [2, 3, 4], block: 64, shared: 100, arguments: 77 } as const
  stream.launch(launch)
  expect(calls).toEqual([[11, 2, 3, 4, 64, 1, 1, 100, stream.handle, 77, 0]])
  fake.failures.set('cuLaunchKernel', 1)
  expect(() => stream.launch(launch)).toThrow(/^k: .*2 x 3 x 4 blocks of 64 threads, 100 bytes/)
  expect(stream.launches).toBe(1)
})

test('waits, timings and orders use events, which are reused or destroyed', async () => {
  const { fake, stream } = make()
  const other = new Stream(fake.driver, { use() {} } as Context, { readsHostMemory: false })
  expect(other.handle).not.toBe(stream.handle)
  let looks = 0
  const wait = stream.sync(() => {
    if (++looks === 3) fake.finish()
  })
  await wait
  expect([looks, fake.events.size]).toEqual([3, 1])
  stream.follow(other)
  expect(fake.log.slice(-2)).toEqual([`record ${other.handle}`, `wait ${stream.handle}`])
  expect(fake.events.size).toBe(1)
  expect(stream.milliseconds(() => fake.finish())).toBe(2)
  const elapsed = stream.elapsed(() => {})
  fake.finish()
  expect(await elapsed).toBe(2)
  expect(fake.events.size).toBe(1)
  await expect(
    stream.sync(() => {
      throw new Error('stop')
    }),
  ).rejects.toThrow('stop')
  expect(fake.events.size).toBe(1)
  for (const one of [stream, other]) one.dispose()
  expect(fake.events.size).toBe(0)
})
