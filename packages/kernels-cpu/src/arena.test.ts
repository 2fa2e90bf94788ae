import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { Arena, type System } from './arena.ts'

const MiB = 2 ** 20

/** Memory that is only counted. */
class FakeSystem implements System {
  readonly blocks = new Map<number, number>()
  readonly discarded: [number, number][] = []
  most = Number.POSITIVE_INFINITY
  #next = MiB

  allocate(bytes: number): number {
    if (bytes > this.most) return 0
    const pointer = this.#next
    // Blocks touch, as those of a system may: they are pieces of their own all the same.
    this.#next += bytes
    this.blocks.set(pointer, bytes)
    return pointer
  }

  release(pointer: number, bytes: number): void {
    expect(this.blocks.get(pointer)).toBe(bytes)
    this.blocks.delete(pointer)
  }

  discard(pointer: number, bytes: number): void {
    this.discarded.push([pointer, bytes])
  }

  get bytes(): number {
    return [...this.blocks.values()].reduce((sum, bytes) => sum + bytes, 0)
  }
}

describe('arena', () => {
  test('what is in use never overlaps and lies in blocks of the system, and all of it goes back', () => {
    const system = new FakeSystem()
    const arena = new Arena(system)
    const random = new Random(3)
    const living: { pointer: number; bytes: number }[] = []
    for (let i = 0; i < 3000; i++) {
      if (living.length > 30 || (living.length > 0 && random.next() < 0.45)) {
        const [{ pointer, bytes }] = living.splice(random.integer(living.length), 1)
        arena.give(pointer, bytes, random.next() < 0.9)
      } else {
        const bytes = Math.ceil(MiB * 2 ** (7 * random.next()))
        const pointer = arena.take(bytes)
        expect(pointer % 64).toBe(0)
        const home = [...system.blocks].some(([start, size]) => start <= pointer && pointer + bytes <= start + size)
        expect(home).toBe(true)
        const clash = living.some(other => pointer < other.pointer + other.bytes && other.pointer < pointer + bytes)
        expect(clash).toBe(false)
        living.push({ pointer, bytes })
      }
      if (i % 500 === 499) arena.trim()
      expect(arena.keptBytes).toBeGreaterThanOrEqual(0)
    }
    for (const { pointer, bytes } of living) arena.give(pointer, bytes, true)
    arena.trim()
    expect(arena.keptBytes).toBe(0)
    expect(system.bytes).toBe(0)
  })

  test('what one size leaves serves another: freed neighbours become one', () => {
    const system = new FakeSystem()
    const arena = new Arena(system)
    const small = Array.from({ length: 60 }, () => arena.take(MiB))
    expect(system.bytes).toBe(64 * MiB)
    // Every other one first, then those between.
    for (const parity of [0, 1]) for (let i = parity; i < 60; i += 2) arena.give(small[i], MiB, true)
    expect(arena.keptBytes).toBe(60 * MiB)
    expect(arena.take(60 * MiB)).toBe(small[0])
    expect(arena.keptBytes).toBe(0)
    expect(system.bytes).toBe(64 * MiB)
  })

  test('the smallest range that is large enough is taken', () => {
    const arena = new Arena(new FakeSystem())
    const [large, , small] = [8, 1, 2, 1].map(size => arena.take(size * MiB))
    arena.give(large, 8 * MiB, true)
    arena.give(small, 2 * MiB, true)
    expect(arena.take(2 * MiB - 5)).toBe(small)
    expect(arena.take(3 * MiB)).toBe(large)
    expect(arena.keptBytes).toBe(5 * MiB)
  })

  test('beside what is in use trim leaves the block, but not the memory that was in use', () => {
    const system = new FakeSystem()
    const arena = new Arena(system)
    const [first, second] = [arena.take(4 * MiB), arena.take(4 * MiB)]
    arena.give(first, 4 * MiB, true)
    arena.trim()
    expect(system.discarded).toEqual([[first, 4 * MiB]])
    expect(arena.keptBytes).toBe(0)
    expect(system.blocks.size).toBe(1)
    // What was never in use is not given back.
    arena.trim()
    expect(system.discarded).toHaveLength(1)
    arena.give(second, 4 * MiB, false)
    expect(system.discarded).toHaveLength(2)
    expect(arena.keptBytes).toBe(0)
  })

  test('without memory for more than is asked for it takes that, and without any nothing', () => {
    const system = new FakeSystem()
    system.most = 5 * MiB
    const arena = new Arena(system)
    expect(arena.take(5 * MiB)).not.toBe(0)
    expect(system.bytes).toBe(5 * MiB)
    expect(arena.take(6 * MiB)).toBe(0)
    expect(system.bytes).toBe(5 * MiB)
  })

  test('takes over what another one has, in use or free', () => {
    const system = new FakeSystem()
    const [arena, other] = [new Arena(system), new Arena(system)]
    const [used, free] = [other.take(2 * MiB), other.take(3 * MiB)]
    other.give(free, 3 * MiB, true)
    arena.absorb(other)
    expect([arena.keptBytes, other.keptBytes]).toEqual([3 * MiB, 0])
    expect(arena.take(3 * MiB)).toBe(free)
    arena.give(used, 2 * MiB, true)
    arena.give(free, 3 * MiB, true)
    arena.trim()
    expect(system.bytes).toBe(0)
  })
})
