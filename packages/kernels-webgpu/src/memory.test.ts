import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { Commands } from './commands.ts'
import type { GpuBuffer } from './gpu.ts'
import { type Buffer, Memory } from './memory.ts'
import { testDevice } from './test-device.ts'

const MiB = 2 ** 20

/** Memory on a device whose buffers are known. */
function make() {
  const gpu = testDevice()
  const alive = new Set<GpuBuffer>()
  const { createBuffer } = gpu.device
  let usage = 0
  gpu.device.createBuffer = descriptor => {
    const buffer = createBuffer(descriptor)
    const { destroy } = buffer
    alive.add(buffer)
    usage = descriptor.usage
    buffer.destroy = () => {
      // Work that may use it has been submitted.
      expect(pending()).toBe(false)
      expect(alive.delete(buffer)).toBe(true)
      destroy()
    }
    return buffer
  }
  let recorded = 0
  const pending = () => recorded > (gpu.calls.submit ?? 0)
  const commands = new Commands(gpu.device)
  alive.clear()
  const memory = new Memory(gpu.device, commands)
  /** Records work, so that something is pending. */
  const record = (buffer: Buffer) => {
    recorded = (gpu.calls.submit ?? 0) + 1
    commands.clear(buffer.gpu, 4)
  }
  const allocate = (bytes: number) => memory.allocate('op', [bytes], 'u8')
  return { ...gpu, memory, alive, record, allocate, usage: () => usage }
}

describe('memory', () => {
  test('gives out separate buffers and counts them, in a random sequence of calls', () => {
    const { memory, alive, record, allocate } = make()
    const random = new Random(5)
    const owners: Buffer[] = []
    let peakBytes = 0
    for (let i = 0; i < 1500; i++) {
      const chance = random.next()
      if (owners.length === 0 || (chance < 0.5 && owners.length < 40)) {
        const bytes = Math.floor(2 ** (24 * random.next()))
        const buffer = allocate(bytes)
        expect(buffer.bytes).toBe(Math.ceil(bytes / 4) * 4)
        expect(buffer.gpu.size).toBeGreaterThanOrEqual(buffer.bytes)
        expect(buffer.gpu.size - buffer.bytes).toBeLessThan(Math.max(256, buffer.bytes / 8))
        expect(owners.some(({ gpu }) => gpu === buffer.gpu)).toBe(false)
        if (bytes > 0) record(buffer)
        owners.push(buffer)
      } else if (chance < 0.6) owners.push(memory.share(owners[random.integer(owners.length)]))
      else if (chance < 0.61) memory.trim()
      else {
        const [buffer] = owners.splice(random.integer(owners.length), 1)
        memory.release(buffer)
      }
      const live = new Set(owners)
      const bytes = [...live].reduce((sum, buffer) => sum + buffer.bytes, 0)
      peakBytes = Math.max(peakBytes, bytes)
      expect(memory.stats()).toEqual({ handles: owners.length, bytes, peakBytes })
      expect([...live].every(({ gpu }) => alive.has(gpu))).toBe(true)
    }
    memory.dispose()
    expect(alive.size).toBe(0)
    // Tensors may be disposed of after their backend.
    for (const owner of owners) memory.release(owner)
    expect(memory.stats()).toEqual({ handles: 0, bytes: 0, peakBytes })
  })

  test('keeps 256 MiB more than live tensors use, and uses it again', () => {
    const { memory, allocate, calls, usage } = make()
    const [live, ...freed] = Array.from({ length: 6 }, () => allocate(64 * MiB))
    expect(usage()).toBe(128 | 4 | 8)
    for (const buffer of freed) memory.release(buffer)
    expect(calls['destroy buffer']).toBeUndefined()
    memory.release(live)
    expect(calls['destroy buffer']).toBe(1)
    const reuse = (created: number) => {
      const again = Array.from({ length: 4 }, () => allocate(64 * MiB))
      expect(calls.createBuffer).toBe(1 + created)
      for (const buffer of again) memory.release(buffer)
      expect(calls['destroy buffer']).toBe(created === 6 ? 2 : 6)
    }
    for (const _ of [1, 2]) reuse(6)
    memory.trim()
    expect(calls['destroy buffer']).toBe(6)
    for (const _ of [1, 2]) reuse(10)
    expect(memory.allocate('op', [3], 'bf16').bytes).toBe(8)
  })

  test('an op that fails frees what it has allocated and not freed itself', () => {
    const { memory, allocate } = make()
    const x = allocate(4)
    const fail = () =>
      memory.during(() => {
        memory.share(x)
        memory.release(allocate(8))
        allocate(8)
        throw new Error('failed')
      })
    expect(fail).toThrow('failed')
    expect(memory.stats()).toMatchObject({ handles: 1, bytes: 4 })
    expect(() =>
      memory.during(() => {
        throw new Error('failed')
      }),
    ).toThrow()
    expect(memory.stats()).toMatchObject({ handles: 1, bytes: 4 })
  })
})
