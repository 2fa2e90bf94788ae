/** @file The allocator on a driver that keeps books: without the emulator's guards, which give every tensor its own allocation. */
import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { type CudaBuffer, classBytes, contiguousForm, Memory, newPool, type Pool, sizeClass } from './memory.ts'
import { FakeDriver } from './test-driver.ts'

const MiB = 2 ** 20
const slab = 2 * MiB

describe('size classes', () => {
  test('are multiples of 256 bytes that waste at most an eighth', () => {
    for (let index = 0; index < 272; index++) {
      const size = classBytes(index)
      expect(size % 256).toBe(0)
      expect(sizeClass(size)).toBe(index)
      expect(sizeClass(size + 1)).toBe(index + 1)
      expect(classBytes(index + 1)).toBeGreaterThan(size)
      expect(classBytes(index + 1) - size).toBeLessThanOrEqual(Math.max(256, size / 8))
    }
    expect(sizeClass(0)).toBe(0)
  })
})

interface Piece {
  readonly pointer: number
  readonly bytes: number
}

/** A memory, and what a correct one does. */
class Model {
  readonly fake = new FakeDriver()
  readonly memory = new Memory(this.fake.driver, 7)
  /** Every owner of every buffer. */
  readonly owners: CudaBuffer[] = []
  /** Copies of buffers in other forms. */
  readonly copies = new Map<CudaBuffer, Map<string, Piece>>()
  readonly reserved: Piece[] = []
  readonly pools: Pool[] = []
  /** Buffers of other pools that were freed during a capture, and may be revived. */
  held: CudaBuffer[] | null = null
  #peakBytes = 0
  #peakReserved = 0
  /** What remains of slabs that are cut into pieces. */
  #remainders = 0

  /** Calls `fn`, which may take memory for `bytes`. */
  take<T>(bytes: number, fn: () => T): T {
    const before = this.fake.taken.length
    const result = fn()
    const added = this.fake.taken.slice(before)
    const size = classBytes(sizeClass(bytes))
    expect(added.length).toBeLessThanOrEqual(1)
    for (const taken of added) expect(taken).toBe(Math.max(size, slab))
    if (added.length > 0 && size < slab) this.#remainders += slab % size
    return result
  }

  release(owner: number): void {
    const [buffer] = this.owners.splice(owner, 1)
    this.memory.release(buffer)
    if (buffer.refs > 0) return
    this.copies.delete(buffer)
    if (this.held !== null && buffer.pool !== this.pools.at(-1)) this.held.push(buffer)
  }

  /** Memory for a tensor that is freed at once. */
  takeBriefly(bytes: number, fn: () => unknown): void {
    this.take(bytes, fn)
    this.#peakBytes = Math.max(this.#peakBytes, this.memory.stats().bytes)
  }

  check(): void {
    const buffers = [...new Set(this.owners)]
    const copies = [...this.copies.values()].flatMap(forms => [...forms.values()])
    const inUse = [...buffers, ...(this.held ?? []), ...copies, ...this.reserved].sort((a, b) => a.pointer - b.pointer)
    const isSound = inUse.every(({ pointer, bytes }, i) => {
      const previous = inUse[i - 1]
      if (previous !== undefined && previous.pointer + Math.max(previous.bytes, 1) > pointer) return false
      return pointer % 256 === 0 && this.fake.contains(pointer, bytes)
    })
    expect(isSound).toBe(true)
    const bytes = buffers.reduce((sum, buffer) => sum + buffer.bytes, 0)
    this.#peakBytes = Math.max(this.#peakBytes, bytes)
    this.#peakReserved = Math.max(this.#peakReserved, this.fake.bytes)
    const used = inUse.reduce((sum, piece) => sum + classBytes(sizeClass(piece.bytes)), 0)
    expect(this.memory.stats()).toEqual({
      handles: this.owners.length,
      bytes,
      peakBytes: this.#peakBytes,
      cachedBytes: this.fake.bytes - used - this.#remainders,
      peakReservedBytes: this.#peakReserved,
    })
  }
}

describe('memory', () => {
  test.each([1, 2])('gives out separate pieces and counts them, in a random sequence of calls (%i)', seed => {
    const model = new Model()
    const { fake, memory, owners, copies, reserved, pools } = model
    const random = new Random(seed)
    const size = () => Math.floor(2 ** (4 + 18 * random.next())) * 4
    const one = () => random.integer(owners.length)
    const step = () => {
      const chance = random.next()
      if (owners.length === 0 || (chance < 0.4 && owners.length < 40)) {
        const bytes = size()
        owners.push(
          model.take(bytes, () => (random.next() < 0.1 ? memory.allocateConstant(bytes) : memory.allocate(bytes))),
        )
      } else if (chance < 0.5) owners.push(memory.share(owners[one()]))
      else if (chance < 0.75) model.release(one())
      else if (chance < 0.9) {
        const buffer = owners[one()]
        const form = random.next() < 0.5 ? contiguousForm : 'other'
        const forms = copies.get(buffer) ?? new Map<string, Piece>()
        const bytes = buffer.bytes / 2
        const { pointer, isFilled } = model.take(bytes, () => memory.rounded(buffer, form, bytes))
        const known = forms.get(form)
        expect(isFilled).toBe(known !== undefined)
        if (known !== undefined) expect(pointer).toBe(known.pointer)
        copies.set(buffer, forms.set(form, { pointer, bytes }))
      } else if (chance < 0.93) {
        const buffer = owners[one()]
        memory.changed(buffer)
        copies.delete(buffer)
      } else if (chance < 0.94) {
        const bytes = size()
        reserved.push({ pointer: model.take(bytes, () => memory.reserve(bytes)), bytes })
      } else if (chance < 0.96) {
        memory.begin('op')
        const bytes = size()
        if (random.next() < 0.5) {
          model.takeBriefly(bytes, () => memory.scratch(bytes))
          memory.end()
        } else {
          model.takeBriefly(bytes, () => memory.allocate(bytes))
          memory.share(owners[one()])
          memory.rollBack()
          copies.clear()
        }
      } else if (model.held !== null && model.held.length > 0) {
        const [buffer] = model.held.splice(random.integer(model.held.length), 1)
        expect(memory.revive(buffer)).toBe(buffer)
        owners.push(buffer)
      } else if (model.held === null && chance < 0.97) memory.trim()
      model.check()
    }
    for (let round = 0; round < 8; round++) {
      for (let i = 0; i < 60; i++) step()
      const pool = newPool()
      pools.push(pool)
      memory.allChanged()
      copies.clear()
      memory.within(pool, () => {
        model.held = []
        for (let i = 0; i < 40; i++) step()
        memory.allChanged()
        copies.clear()
      })
      model.held = null
      model.check()
      if (round % 3 === 2) {
        for (const ended of pools.splice(0)) memory.dissolve(ended)
        model.check()
      }
    }
    while (owners.length < 40) owners.push(memory.allocate(size()))
    for (const owner of owners) memory.rounded(owner, contiguousForm, owner.bytes / 2)
    const { length } = fake.waits
    for (const _ of [1, 2]) memory.dispose()
    expect([fake.bytes, fake.waits.length]).toEqual([0, length + 1])
    expect(memory.stats()).toMatchObject({ handles: 0, bytes: 0, cachedBytes: 0 })
  })
  const open = (options = {}) => {
    const fake = new FakeDriver()
    return { fake, memory: new Memory(fake.driver, 7, options) }
  }
  const outOfMemory = expect.objectContaining({ code: 'E_OUT_OF_MEMORY' })

  test('before it runs out, it waits and returns cached memory and copies that the current op does not use', () => {
    const { fake, memory } = open()
    fake.limit = 18 * MiB
    memory.begin('first')
    const [kept, used, freed] = [memory.allocate(4 * MiB), memory.allocate(4 * MiB), memory.allocate(3 * MiB)]
    memory.rounded(kept, contiguousForm, 2 * MiB)
    memory.rounded(used, 'other', 2 * MiB)
    const { pointer } = memory.rounded(used, contiguousForm, 2 * MiB)
    memory.begin('second')
    memory.rounded(used, contiguousForm, 2 * MiB)
    memory.release(freed)
    expect([fake.bytes, fake.waits]).toEqual([17 * MiB, []])
    memory.allocate(6 * MiB)
    expect([fake.bytes, fake.waits]).toEqual([18 * MiB, [7]])
    expect(memory.rounded(used, contiguousForm, 2 * MiB)).toEqual({ pointer, isFilled: true })
    // A stream that is being captured cannot be waited for.
    memory.changed(used)
    expect(() => memory.within(newPool(), () => memory.allocate(5 * MiB))).toThrow(outOfMemory)
    expect(fake.waits).toEqual([7])
    expect(() => memory.allocate(8 * MiB)).toThrow(
      expect.objectContaining({
        code: 'E_OUT_OF_MEMORY',
        op: 'second',
        message: expect.stringMatching(
          /8\.0 MiB: 3 tensors already use 14\.0 MiB \(allocated by: first 8\.0 MiB, second 6\.0 MiB\)/,
        ),
        details: { bytes: 8 * MiB, liveBytes: 14 * MiB, holders: { first: 8 * MiB, second: 6 * MiB } },
      }),
    )
    expect(fake.bytes).toBe(14 * MiB)
  })

  test('small tensors share an allocation, and memory is used again', () => {
    const { fake, memory } = open()
    const small = Array.from({ length: 100 }, () => memory.allocate(4000))
    const large = memory.allocate(3 * MiB)
    for (const buffer of [...small, large]) memory.release(buffer)
    for (const { bytes } of [...small, large]) memory.allocate(bytes)
    memory.within(newPool(), () => {
      for (let i = 0; i < 10; i++) memory.release(memory.allocate(5 * MiB))
      memory.allocate(4000)
    })
    expect(fake.taken).toEqual([slab, 3 * MiB, 5 * MiB])
  })

  test('nobody else gets the memory in which a graph computes, until the graph is disposed', () => {
    const { fake, memory } = open()
    const pool = newPool()
    const [inside, result, constant] = memory.within(pool, () => {
      const inside = memory.allocate(4 * MiB)
      memory.release(inside)
      return [inside, memory.allocate(3 * MiB), memory.allocateConstant(5 * MiB)]
    })
    memory.release(result)
    memory.release(constant)
    const others = [4, 3, 5].map(size => memory.allocate(size * MiB))
    const pointers = others.map(({ pointer }) => pointer)
    expect(pointers).not.toContain(inside.pointer)
    expect(pointers).not.toContain(result.pointer)
    expect(pointers).toContain(constant.pointer)
    const again = memory.within(pool, () => memory.allocate(3 * MiB))
    expect(again.pointer).toBe(result.pointer)
    memory.dissolve(pool)
    memory.release(again)
    expect(memory.allocate(4 * MiB).pointer).toBe(inside.pointer)
    expect(memory.allocate(3 * MiB).pointer).toBe(result.pointer)
    expect(fake.taken.length).toBe(5)
  })

  test('an op that fails frees what it has allocated and not freed itself', () => {
    const { memory } = open()
    memory.begin('fails')
    const copied = memory.allocate(4)
    memory.rounded(copied, contiguousForm, 2)
    memory.release(memory.allocate(4))
    memory.scratch(4)
    memory.rollBack()
    expect(memory.stats()).toMatchObject({ handles: 0, bytes: 0 })
    memory.begin('next')
    memory.end()
    memory.rollBack()
  })

  test.each([true, false])('failures of the driver are errors, guarded: %s', guarded => {
    const { fake, memory } = open({ guarded })
    memory.begin('op')
    fake.failures.set(guarded ? 'cuMemAllocAsync' : 'cuMemAlloc', 719)
    expect(() => memory.allocate(4)).toThrow(
      expect.objectContaining({ code: 'E_BACKEND', op: 'op', details: expect.objectContaining({ lost: true }) }),
    )
  })

  test('the limit counts tensors, up to the last byte', () => {
    const { memory } = open({ limit: 1000 })
    const buffer = memory.allocate(600)
    memory.rounded(buffer, contiguousForm, 300)
    expect(() => memory.allocate(401)).toThrow(outOfMemory)
    memory.allocate(400)
    memory.release(buffer)
    memory.allocate(600)
  })

  test('guarded memory is allocated and freed tensor by tensor', () => {
    const { fake, memory } = open({ guarded: true })
    const [empty, buffer] = [memory.allocate(0), memory.allocate(1000)]
    memory.rounded(buffer, contiguousForm, 500)
    memory.reserve(256)
    expect(fake.taken).toEqual([1, 1000, 500, 256])
    memory.release(buffer)
    expect([...fake.blocks.values()]).toEqual([1, 256])
    fake.limit = 300
    expect(() => memory.allocate(100)).toThrow(
      expect.objectContaining({
        code: 'E_OUT_OF_MEMORY',
        details: { bytes: 100, liveBytes: 0, holders: { upload: 0 } },
      }),
    )
    memory.rounded(empty, contiguousForm, 10)
    memory.dispose()
    expect(fake.bytes).toBe(0)
    // Afterwards, its owners may still be disposed of.
    memory.release(empty)
    memory.dispose()
    expect(() => memory.allocate(1)).toThrow(expect.objectContaining({ code: 'E_DISPOSED' }))
  })

  test('a handle that is freed twice is an error', () => {
    const { memory } = open()
    const buffer = memory.revive(memory.share(memory.allocate(4)))
    for (const _ of [1, 2, 3]) memory.release(buffer)
    expect(() => memory.release(buffer)).toThrow(expect.objectContaining({ code: 'E_DISPOSED' }))
  })

  test('an op writes bf16 copies of its outputs from the first read of one until one goes unread', () => {
    const { fake, memory } = open({ guarded: true })
    const output = (op: string, kind: string) => {
      memory.begin(op)
      const buffer = memory.allocate(4000)
      return { buffer, copy: memory.roundedBy(buffer, kind) }
    }
    const first = output('norm', '64')
    expect(first.copy).toBe(0)
    memory.rounded(first.buffer, 'transposed', 2000)
    expect(output('norm', '64').copy).toBe(0)
    memory.rounded(first.buffer, contiguousForm, 2000)
    memory.release(first.buffer)
    expect([output('norm', '32').copy, output('other', '64').copy]).toEqual([0, 0])
    const second = output('norm', '64')
    expect(fake.blocks.get(second.copy)).toBe(2000)
    const read = memory.rounded(second.buffer, contiguousForm, 2000)
    expect(read).toEqual({ pointer: second.copy, isFilled: true })
    memory.release(second.buffer)
    const unread = output('norm', '64')
    expect(unread.copy).toBeGreaterThan(0)
    memory.release(unread.buffer)
    expect(output('norm', '64').copy).toBe(0)
  })
})
