import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { Arena, type System } from './arena.ts'

const MiB = 2 ** 20

/** Memory that only exists as addresses. */
class FakeSystem implements System {
  readonly blocks = new Map<number, number>()
  readonly discarded: [number, number][] = []
  limit = Number.POSITIVE_INFINITY
  #next = MiB

  allocate(bytes: number): number {
    if (bytes > this.limit) return 0
    const pointer = this.#next
    // Blocks are adjacent, as a system's may be, but must still be treated as separate.
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
  test('hands out ranges that never overlap and are inside blocks of the system, and returns everything', () => {
    const system = new FakeSystem()
    const arena = new Arena(system)
    const random = new Random(3)
    const inUse: { pointer: number; bytes: number }[] = []
    for (let i = 0; i < 3000; i++) {
      if (inUse.length > 30 || (inUse.length > 0 && random.next() < 0.45)) {
        const [{ pointer, bytes }] = inUse.splice(random.integer(inUse.length), 1)
        arena.give(pointer, bytes, random.next() < 0.9)
      } else {
        const bytes = Math.ceil(MiB * 2 ** (7 * random.next()))
        const pointer = arena.take(bytes)
        expect(pointer % 64).toBe(0)
        const isInside = [...system.blocks].some(([start, size]) => start <= pointer && pointer + bytes <= start + size)
        expect(isInside).toBe(true)
        const overlaps = inUse.some(other => pointer < other.pointer + other.bytes && other.pointer < pointer + bytes)
        expect(overlaps).toBe(false)
        inUse.push({ pointer, bytes })
      }
      if (i % 500 === 499) arena.trim()
      expect(arena.keptBytes).toBeGreaterThanOrEqual(0)
    }
    for (const { pointer, bytes } of inUse) arena.give(pointer, bytes, true)
    arena.trim()
    expect(arena.keptBytes).toBe(0)
    expect(system.bytes).toBe(0)
  })

  test('merges adjacent freed ranges and reuses them for other sizes', () => {
    const system = new FakeSystem()
    const arena = new Arena(system)
    const small = Array.from({ length: 60 }, () => arena.take(MiB))
    expect(system.bytes).toBe(64 * MiB)
    // Frees every other one first, then those in between.
    for (const parity of [0, 1]) for (let i = parity; i < 60; i += 2) arena.give(small[i], MiB, true)
    expect(arena.keptBytes).toBe(60 * MiB)
    expect(arena.take(60 * MiB)).toBe(small[0])
    expect(arena.keptBytes).toBe(0)
    expect(system.bytes).toBe(64 * MiB)
  })

  test('takes the smallest free range that is large enough', () => {
    const arena = new Arena(new FakeSystem())
    const [large, , small] = [8, 1, 2, 1].map(size => arena.take(size * MiB))
    arena.give(large, 8 * MiB, true)
    arena.give(small, 2 * MiB, true)
    expect(arena.take(2 * MiB - 5)).toBe(small)
    expect(arena.take(3 * MiB)).toBe(large)
    expect(arena.keptBytes).toBe(5 * MiB)
  })

  test('when trimmed, keeps a block that is partly in use but discards its freed memory', () => {
    const system = new FakeSystem()
    const arena = new Arena(system)
    const [first, second] = [arena.take(4 * MiB), arena.take(4 * MiB)]
    arena.give(first, 4 * MiB, true)
    arena.trim()
    expect(system.discarded).toEqual([[first, 4 * MiB]])
    expect(arena.keptBytes).toBe(0)
    expect(system.blocks.size).toBe(1)
    // Memory that was never used is not discarded.
    arena.trim()
    expect(system.discarded).toHaveLength(1)
    arena.give(second, 4 * MiB, false)
    expect(system.discarded).toHaveLength(2)
    expect(arena.keptBytes).toBe(0)
  })

  test('allocates only what is requested if there is no memory for a larger segment, and returns 0 if there is none', () => {
    const system = new FakeSystem()
    system.limit = 5 * MiB
    const arena = new Arena(system)
    expect(arena.take(5 * MiB)).not.toBe(0)
    expect(system.bytes).toBe(5 * MiB)
    expect(arena.take(6 * MiB)).toBe(0)
    expect(system.bytes).toBe(5 * MiB)
  })

  test('absorbs the ranges of another arena, in use or free', () => {
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
