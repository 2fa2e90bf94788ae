/** @file Memory of tensors: reference-counted buffers. Small blocks are cached in size classes and reused; large ones are ranges of an arena. */
import { MoeError } from '@moe/core'
import { Arena } from './arena.ts'
import type { NativeLibrary } from './load.ts'

/** A piece of native memory. @moe/core uses it as a handle; each handle accounts for one of `refs`. */
export interface CpuBuffer {
  /** Address of the first element, a multiple of 64. */
  readonly pointer: number
  readonly bytes: number
  readonly pool: Pool
  refs: number
  /** Position in the list of live buffers. */
  slot: number
  /** A bf16 copy of these f32 elements, read by matrix products. It lives as long as the buffer; whoever writes the buffer updates it. */
  rounded: CpuBuffer | null
  /** Whether a product has asked for that copy. */
  roundedWanted: boolean
}

/** Freed memory. A captured graph has its own pool, so that nobody else writes to the memory in which it computes. */
export interface Pool {
  /** Small blocks by size class. */
  readonly free: number[][]
  readonly large: Arena
  /** Freed buffers; only used with `guarded`, which reuses no memory. */
  readonly dead: CpuBuffer[]
  /** Whether its graph has been disposed: memory that is returned later goes to the shared pool. */
  dissolved: boolean
}

export interface MemoryOptions {
  /** Maximum total size of live tensors in bytes; beyond it, E_OUT_OF_MEMORY. Default: no limit. */
  readonly limit?: number | undefined
  /** For tests: puts guard bytes around every buffer, initializes it to NaN, and returns it to the system when it is freed. */
  readonly guarded?: boolean | undefined
}

/** Memory use of a backend. */
export interface MemoryStats {
  /** Number of live handles. */
  readonly handles: number
  /** Total size of the live buffers in bytes. */
  readonly bytes: number
  /** Highest `bytes` so far. */
  readonly peakBytes: number
  /** Bytes cached for later tensors. */
  readonly cachedBytes: number
}

/** The cache may always grow to this many bytes, and up to the peak of live memory if that is larger. */
const minCacheBytes = 256 * 2 ** 20
/** Buffers of at least this many bytes are placed in arenas; and the number of size classes for smaller ones. */
const [large, classes] = [2 ** 20, 57]
const guardBytes = 64
/** -1.7e38 as f32: a result computed from it is visibly wrong. */
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
  /** Buffers that were freed during `within`, since the caller last emptied the list. */
  readonly freed: CpuBuffer[] = []
  /** Buffers of other pools that were freed during `within` and are recycled when it ends. */
  readonly #deferred: CpuBuffer[] = []
  #pool: Pool
  #handles = 0
  #bytes = 0
  #peakBytes = 0
  #cachedBytes = 0
  /** Buffers allocated by the current op, to be released if it fails. */
  readonly #allocatedByOp: CpuBuffer[] = []
  #disposed = false

  constructor(library: NativeLibrary, options: MemoryOptions = {}) {
    this.#library = library
    this.#shared = this.#pool = this.newPool()
    // Beyond that, sums of bytes would be inexact.
    this.#limit = Math.min(options.limit ?? Number.POSITIVE_INFINITY, Number.MAX_SAFE_INTEGER)
    this.#guarded = options.guarded ?? false
  }

  /** Checks that the memory has not been returned to the system. @throws MoeError E_DISPOSED */
  needAlive(): void {
    if (this.#disposed)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cpu', problem: 'the backend has been disposed' })
  }

  /** Uninitialized memory with one owner. @throws MoeError E_OUT_OF_MEMORY */
  allocate(bytes: number): CpuBuffer {
    this.needAlive()
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
    this.#allocatedByOp.push(buffer)
    this.#handles++
    this.#bytes += bytes
    if (this.#bytes > this.#peakBytes) this.#peakBytes = this.#bytes
    return buffer
  }

  /** A pool for `within`. */
  newPool(): Pool {
    const free = Array.from({ length: classes }, () => [])
    return { free, large: new Arena(this.#library), dead: [], dissolved: false }
  }

  /** Memory for a constant of a graph. It comes from the shared pool, because the graph overwrites its own pool at every replay. */
  allocateConstant(bytes: number): CpuBuffer {
    const pool = this.#pool
    this.#pool = this.#shared
    try {
      return this.allocate(bytes)
    } finally {
      this.#pool = pool
    }
  }

  /** Adds an owner. */
  share(buffer: CpuBuffer): CpuBuffer {
    this.needAlive()
    buffer.refs++
    this.#handles++
    this.#allocatedByOp.push(buffer)
    return buffer
  }

  /** Whether a live graph may write to the buffer when it is replayed. */
  belongsToGraph({ pool }: CpuBuffer): boolean {
    return pool !== this.#shared && !pool.dissolved
  }

  /** Attaches a bf16 copy to a buffer. The copy no longer counts as a handle. */
  attachRounded(buffer: CpuBuffer, rounded: CpuBuffer): void {
    buffer.rounded = rounded
    this.#handles--
  }

  /** Removes an owner, and frees the buffer with the last one. Harmless once everything has been disposed. */
  release(buffer: CpuBuffer): void {
    if (this.#disposed) return
    if (buffer.refs <= 0)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cpu', problem: 'this handle has already been freed' })
    this.#handles--
    if (--buffer.refs > 0) return
    const last = this.#live.pop() as CpuBuffer
    if (last !== buffer) {
      this.#live[buffer.slot] = last
      last.slot = buffer.slot
    }
    this.#bytes -= buffer.bytes
    if (this.#pool !== this.#shared) this.freed.push(buffer)
    if (this.#pool !== this.#shared && buffer.pool !== this.#pool) this.#deferred.push(buffer)
    else this.#recycle(buffer)
  }

  /**
   * Runs `fn` with allocations from this pool. Buffers of other pools that `fn` frees are held until it ends, so that `revive` can restore
   * them.
   */
  within<T>(pool: Pool, fn: () => T): T {
    this.#pools.add(pool)
    this.#pool = pool
    try {
      return fn()
    } finally {
      this.#pool = this.#shared
      this.freed.length = 0
      for (const buffer of this.#deferred) this.#recycle(buffer)
      this.#deferred.length = 0
    }
  }

  /** Adds an owner to a buffer that may have been freed during `within`. */
  revive(buffer: CpuBuffer): CpuBuffer {
    const at = this.#deferred.indexOf(buffer)
    if (at < 0) return this.share(buffer)
    this.#deferred.splice(at, 1)
    buffer.refs = 1
    buffer.slot = this.#live.length
    this.#live.push(buffer)
    this.#handles++
    this.#bytes += buffer.bytes
    return buffer
  }

  /** Moves a pool's memory to the shared pool. */
  dissolve(pool: Pool): void {
    this.#pools.delete(pool)
    pool.dissolved = true
    for (const [index, list] of pool.free.entries()) this.#shared.free[index].push(...list.splice(0))
    this.#shared.large.absorb(pool.large)
    for (const buffer of pool.dead.splice(0)) this.#recycle(buffer)
  }

  /** Starts an op: later allocations belong to it. */
  begin(): void {
    this.#allocatedByOp.length = 0
  }

  /** Releases the outputs of an op that failed. */
  rollBack(): void {
    for (const buffer of this.#allocatedByOp) if (buffer.refs > 0) this.release(buffer)
    this.#allocatedByOp.length = 0
  }

  stats(): MemoryStats {
    return { handles: this.#handles, bytes: this.#bytes, peakBytes: this.#peakBytes, cachedBytes: this.#cachedBytes }
  }

  /** Returns cached memory to the system. */
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

  /** Returns all memory to the system, including that of live buffers. */
  dispose(): void {
    for (const pool of this.#pools) this.dissolve(pool)
    for (const buffer of this.#live) {
      buffer.refs = 0
      buffer.rounded = null // In the list of live buffers itself.
      this.#recycle(buffer)
    }
    this.#live.length = 0
    this.trim()
    this.#handles = this.#bytes = 0
    this.#disposed = true
  }

  /** Checks the guard bytes of all live buffers, with `guarded`. @throws Error if a kernel wrote outside a buffer */
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

  #recycle(buffer: CpuBuffer): void {
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
      pool !== this.#shared || this.#cachedBytes + size <= Math.max(minCacheBytes, this.#peakBytes)
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
      ['after', pointer + bytes],
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
      problem: `cannot allocate ${bytes} bytes: ${this.#live.length} tensors already use ${this.#bytes} bytes`,
      fix: 'use a smaller batch or free tensors that are no longer needed',
      details: { bytes, liveBytes: this.#bytes },
    })
  }
}

/** Size classes: multiples of 64 up to 1 KiB, then four per doubling. */
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
