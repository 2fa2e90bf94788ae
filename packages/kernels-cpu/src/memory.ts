/** @file Memory of tensors: buffers with owners. Small ones are kept in size classes for the next tensor of about that size, large ones are ranges of an arena. */
import { MoeError } from '@moe/core'
import { Arena } from './arena.ts'
import type { NativeLibrary } from './load.ts'

/** One piece of native memory. What @moe/core holds as a handle; each handle is one of `refs`. */
export interface CpuBuffer {
  /** Address of the first element, a multiple of 64. */
  readonly pointer: number
  readonly bytes: number
  readonly pool: Pool
  refs: number
  /** Position in the list of live buffers. */
  slot: number
  /** The same f32 elements in bf16, for products. It lives as long as the buffer, and whoever writes to that writes both. */
  rounded: CpuBuffer | null
  /** Whether a product has looked for them. */
  roundedWanted: boolean
}

/** Memory that was freed. A captured graph has a pool of its own, so that nobody else writes where it computes. */
export interface Pool {
  /** Small blocks by size class. */
  readonly free: number[][]
  readonly large: Arena
  /** With `guarded`, where nothing is used again: what was freed. */
  readonly dead: CpuBuffer[]
  /** Whether its graph is gone: what still comes back is everybody's. */
  dissolved: boolean
}

export interface MemoryOptions {
  /** Most bytes that live tensors may take together; beyond it, E_OUT_OF_MEMORY. No limit by default. */
  readonly limit?: number
  /** For tests: every buffer lies between guard bytes, starts as NaN, and is given back at once. */
  readonly guarded?: boolean
}

/** Memory of a backend, as tests and trainings watch it. */
export interface MemoryStats {
  /** Handles that are alive. */
  readonly handles: number
  /** Bytes that those handles hold. */
  readonly bytes: number
  /** Highest `bytes` so far. */
  readonly peakBytes: number
  /** Bytes that are kept for later tensors. */
  readonly cachedBytes: number
}

/** Freed memory below this many bytes is kept in any case; above it, as much as was ever live at once. */
const leastCache = 256 * 2 ** 20
/** From so many bytes on buffers are in arenas; the classes of smaller ones. */
const [large, classes] = [2 ** 20, 57]
const guardBytes = 64
/** -1.7e38 as f32: a result that read it cannot pass for right. */
const guardPattern = 0xfe
/** All bits set is NaN in every float dtype and -1 in i32. */
const poison = 0xff

export class Memory {
  readonly #library: NativeLibrary
  readonly #limit: number
  readonly #guarded: boolean
  readonly #shared: Pool
  readonly #live: CpuBuffer[] = []
  readonly #pools = new Set<Pool>()
  /** Buffers of other pools that were freed during `within`. */
  readonly #held: CpuBuffer[] = []
  #pool: Pool
  #handles = 0
  #bytes = 0
  #peakBytes = 0
  #cachedBytes = 0
  /** Buffers given out by the op that runs, to be taken back if it fails. */
  readonly #fresh: CpuBuffer[] = []
  #disposed = false

  constructor(library: NativeLibrary, options: MemoryOptions = {}) {
    this.#library = library
    this.#shared = this.#pool = this.newPool()
    this.#limit = options.limit ?? Number.POSITIVE_INFINITY
    this.#guarded = options.guarded ?? false
  }

  /** Uninitialized memory with one owner. @throws MoeError E_OUT_OF_MEMORY */
  allocate(bytes: number): CpuBuffer {
    if (this.#disposed)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cpu', problem: 'the backend was disposed' })
    if (this.#bytes + bytes > this.#limit) throw this.#exhausted(bytes)
    const pointer = this.#guarded ? this.#allocateGuarded(bytes) : this.#take(bytes)
    if (pointer === 0) throw this.#exhausted(bytes)
    const buffer: CpuBuffer = {
      pointer,
      bytes,
      pool: this.#pool,
      refs: 1,
      slot: this.#live.length,
      rounded: null,
      roundedWanted: false,
    }
    this.#live.push(buffer)
    this.#fresh.push(buffer)
    this.#handles++
    this.#bytes += bytes
    if (this.#bytes > this.#peakBytes) this.#peakBytes = this.#bytes
    return buffer
  }

  /** For `within`. */
  newPool(): Pool {
    const free = Array.from({ length: classes }, () => [])
    return { free, large: new Arena(this.#library), dead: [], dissolved: false }
  }

  /** Memory for a constant of a graph: of everybody's pool, as the graph writes to its own at every replay. */
  allocateConstant(bytes: number): CpuBuffer {
    const pool = this.#pool
    this.#pool = this.#shared
    try {
      return this.allocate(bytes)
    } finally {
      this.#pool = pool
    }
  }

  /** One more owner. */
  share(buffer: CpuBuffer): CpuBuffer {
    buffer.refs++
    this.#handles++
    this.#fresh.push(buffer)
    return buffer
  }

  /** Whether a graph that is still there may write to the buffer at any replay. */
  isOfGraph({ pool }: CpuBuffer): boolean {
    return pool !== this.#shared && !pool.dissolved
  }

  /** Gives a buffer its copy in bf16, which is no handle of anybody's from here on. */
  attachRounded(buffer: CpuBuffer, rounded: CpuBuffer): void {
    buffer.rounded = rounded
    this.#handles--
  }

  /** One owner less. */
  release(buffer: CpuBuffer): void {
    if (buffer.refs <= 0)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cpu', problem: 'a handle was freed twice' })
    this.#handles--
    if (--buffer.refs > 0) return
    const last = this.#live.pop() as CpuBuffer
    if (last !== buffer) {
      this.#live[buffer.slot] = last
      last.slot = buffer.slot
    }
    this.#bytes -= buffer.bytes
    if (this.#pool !== this.#shared && buffer.pool !== this.#pool) this.#held.push(buffer)
    else this.#giveBack(buffer)
  }

  /**
   * What `fn` allocates comes from the pool and goes back to it. What it frees of other pools is held until it ends, so that
   * `revive` can take it back.
   */
  within<T>(pool: Pool, fn: () => T): T {
    this.#pools.add(pool)
    this.#pool = pool
    try {
      return fn()
    } finally {
      this.#pool = this.#shared
      for (const buffer of this.#held) this.#giveBack(buffer)
      this.#held.length = 0
    }
  }

  /** One owner for a buffer that may have been freed during `within`. */
  revive(buffer: CpuBuffer): CpuBuffer {
    const at = this.#held.indexOf(buffer)
    if (at < 0) return this.share(buffer)
    this.#held.splice(at, 1)
    buffer.refs = 1
    buffer.slot = this.#live.length
    this.#live.push(buffer)
    this.#handles++
    this.#bytes += buffer.bytes
    return buffer
  }

  /** What a pool holds goes to everybody. */
  dissolve(pool: Pool): void {
    this.#pools.delete(pool)
    pool.dissolved = true
    for (const [index, list] of pool.free.entries()) this.#shared.free[index].push(...list.splice(0))
    this.#shared.large.absorb(pool.large)
    for (const buffer of pool.dead.splice(0)) this.#giveBack(buffer)
  }

  /** An op begins: what it allocates from here on is its own. */
  begin(): void {
    this.#fresh.length = 0
  }

  /** The op failed: its outputs are given back. */
  rollBack(): void {
    for (const buffer of this.#fresh) if (buffer.refs > 0) this.release(buffer)
    this.#fresh.length = 0
  }

  stats(): MemoryStats {
    return { handles: this.#handles, bytes: this.#bytes, peakBytes: this.#peakBytes, cachedBytes: this.#cachedBytes }
  }

  /** Gives what no tensor uses back to the system. */
  trim(): void {
    for (const [index, list] of this.#shared.free.entries()) {
      this.#cachedBytes -= list.length * classBytes(index)
      for (const pointer of list) this.#library.release(pointer, classBytes(index))
      list.length = 0
    }
    this.#cachedBytes -= this.#shared.large.keptBytes
    this.#shared.large.trim()
    this.#library.trim()
  }

  /** Gives everything back, living buffers too. */
  dispose(): void {
    for (const pool of this.#pools) this.dissolve(pool)
    for (const buffer of this.#live) {
      buffer.refs = 0
      buffer.rounded = null // Alive itself.
      this.#giveBack(buffer)
    }
    this.#live.length = 0
    this.trim()
    this.#handles = this.#bytes = 0
    this.#disposed = true
  }

  /** With `guarded`: @throws Error when a kernel wrote beside a living buffer. */
  checkGuards(): void {
    if (this.#guarded) for (const buffer of this.#live) this.#checkGuard(buffer)
  }

  #take(bytes: number): number {
    const pointer = this.#find(bytes)
    if (pointer !== 0) return pointer
    this.trim()
    return this.#find(bytes)
  }

  #find(bytes: number): number {
    return bytes < large ? this.#findSmall(sizeClass(bytes)) : this.#findLarge(bytes)
  }

  #findSmall(index: number): number {
    const pointer = this.#pool.free[index].pop()
    if (pointer === undefined) return this.#library.allocate(classBytes(index))
    this.#cachedBytes -= classBytes(index)
    return pointer
  }

  #findLarge(bytes: number): number {
    const arena = this.#pool.large
    this.#cachedBytes -= arena.keptBytes
    const pointer = arena.take(bytes)
    this.#cachedBytes += arena.keptBytes
    return pointer
  }

  #giveBack(buffer: CpuBuffer): void {
    if (buffer.rounded !== null) {
      this.#handles++
      this.release(buffer.rounded)
      buffer.rounded = null
    }
    const pool = buffer.pool.dissolved ? this.#shared : buffer.pool
    if (this.#guarded) {
      if (pool !== this.#shared) {
        pool.dead.push(buffer)
        return
      }
      this.#checkGuard(buffer)
      this.#library.release(buffer.pointer - guardBytes, buffer.bytes + 2 * guardBytes)
      return
    }
    const keeps = (size: number) =>
      pool !== this.#shared || this.#cachedBytes + size <= Math.max(leastCache, this.#peakBytes)
    if (buffer.bytes >= large) {
      const kept = pool.large.keptBytes
      pool.large.give(buffer.pointer, buffer.bytes, keeps(buffer.bytes))
      this.#cachedBytes += pool.large.keptBytes - kept
      return
    }
    const index = sizeClass(buffer.bytes)
    const size = classBytes(index)
    if (keeps(size)) {
      pool.free[index].push(buffer.pointer)
      this.#cachedBytes += size
    } else {
      this.#library.release(buffer.pointer, size)
    }
  }

  #allocateGuarded(bytes: number): number {
    const pointer = this.#library.allocate(bytes + 2 * guardBytes)
    if (pointer === 0) return 0
    const content = new Uint8Array(bytes + 2 * guardBytes).fill(guardPattern)
    content.fill(poison, guardBytes, guardBytes + bytes)
    this.#library.upload(pointer, content, content.length)
    return pointer + guardBytes
  }

  #checkGuard({ pointer, bytes }: CpuBuffer): void {
    const content = new Uint8Array(guardBytes)
    for (const [side, at] of [
      ['before', pointer - guardBytes],
      ['behind', pointer + bytes],
    ] as const) {
      this.#library.download(content, at, guardBytes)
      if (content.some(byte => byte !== guardPattern))
        throw new Error(`a kernel wrote ${side} a buffer of ${bytes} bytes`)
    }
  }

  #exhausted(bytes: number): MoeError {
    return new MoeError({
      code: 'E_OUT_OF_MEMORY',
      op: 'kernels-cpu',
      problem: `no memory for ${bytes} bytes beside the ${this.#bytes} bytes of ${this.#live.length} tensors`,
      fix: 'make the batch smaller or free tensors that are no longer needed',
      details: { bytes, liveBytes: this.#bytes },
    })
  }
}

/** Classes: multiples of 64 up to 1 KiB, then four steps per doubling. */
function sizeClass(bytes: number): number {
  if (bytes <= 1024) return bytes <= 64 ? 1 : (bytes + 63) >>> 6
  const exponent = 31 - Math.clz32(bytes - 1)
  return 17 + (exponent - 10) * 4 + (((bytes - 1) >>> (exponent - 2)) & 3)
}

function classBytes(index: number): number {
  if (index <= 16) return index * 64
  const step = index - 17
  return 2 ** ((step >> 2) + 8) * (5 + (step & 3))
}
