/**
 * @file Device memory: a caching allocator, and buffers with owners.
 *
 * Everything runs on one stream, so a buffer that is freed while kernels still use it can be handed out again at once: whoever
 * gets it writes to it later on the same stream.
 */
import { type BackendStats, MoeError } from '@moe/core'
import type { Driver } from './driver/driver.ts'
import { status } from './driver/status.ts'

/** A piece of device memory. Tensors that share it are owners. */
export interface CudaBuffer {
  readonly pointer: number
  /** As asked for. */
  readonly bytes: number
  /** The op that made it. */
  readonly op: string
  readonly pool: Pool
  refs: number
  /** Place among the living. */
  slot: number
  /** Its elements in fewer bits, as long as they stay what they are. */
  rounded: RoundedCopy[] | null
  /** What `roundedBy` was told, or ''. */
  kind: string
}

/** A copy in fewer bits; `form` says what it is. */
interface RoundedCopy {
  readonly form: string
  readonly pointer: number
  readonly bytes: number
  readonly pool: Pool
  /** The op that used it last. */
  lastOp: number
  /** Whether its tensor's op wrote it, and nobody has read it. */
  isUnread: boolean
}

/** The form of a copy in bf16 without gaps, element by element as the tensor is. */
export const asItLies = 'bf16'

/** Freed pieces, by size class. A captured graph keeps what it took in a pool of its own, so that nobody else writes where it computes. */
export interface Pool {
  readonly free: number[][]
  /** Whether its graph is gone: what still comes back is everybody's. */
  dissolved: boolean
}

/** Memory of a backend, with what it keeps for later tensors. */
export interface MemoryStats extends BackendStats {
  /** Bytes that are kept for later tensors. */
  readonly cachedBytes: number
  /** Highest number of bytes taken from the device, cache included. */
  readonly peakReservedBytes: number
}

export interface MemoryOptions {
  /** Most bytes of all tensors together. */
  readonly limit?: number
  /** Every buffer is an allocation of its own, so that a checker (the emulator, compute-sanitizer) knows its borders. Slow. */
  readonly guarded?: boolean
}

/** Smaller pieces are cut from slabs of this size: the driver takes microseconds per allocation. */
const slabBytes = 2 ** 21

export class Memory {
  readonly #driver: Driver
  readonly #stream: number
  readonly #limit: number
  readonly #guarded: boolean
  readonly #live: CudaBuffer[] = []
  readonly #fresh: CudaBuffer[] = []
  readonly #scratch: CudaBuffer[] = []
  readonly #held: CudaBuffer[] = []
  /** Buffers with a rounded copy. */
  readonly #rounded = new Set<CudaBuffer>()
  /** Kinds of outputs that somebody reads in bf16. */
  readonly #kindsRounded = new Set<string>()
  readonly #reserved: Array<{ readonly pointer: number; readonly bytes: number }> = []
  readonly #shared: Pool = newPool()
  /** Slabs are cut up for good: they are given back at the end only. */
  readonly #slabs: number[] = []
  #pool = this.#shared
  #recording = false
  #op = ''
  /** Ops begun so far. */
  #ops = 0
  #handles = 0
  #bytes = 0
  #peakBytes = 0
  #cachedBytes = 0
  #reservedBytes = 0
  #peakReservedBytes = 0
  #disposed = false

  constructor(driver: Driver, stream: number, options: MemoryOptions = {}) {
    this.#driver = driver
    this.#stream = stream
    this.#limit = options.limit ?? Number.POSITIVE_INFINITY
    this.#guarded = options.guarded ?? false
  }

  /** Whether every buffer is an allocation of its own. */
  get guarded(): boolean {
    return this.#guarded
  }

  /** The op that runs, or ran last. */
  get op(): string {
    return this.#op
  }

  /** Uninitialized memory with one owner. @throws MoeError E_OUT_OF_MEMORY */
  allocate(bytes: number): CudaBuffer {
    if (this.#disposed)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cuda', problem: 'the backend is disposed' })
    if (this.#bytes + bytes > this.#limit) throw this.#exhausted(bytes)
    const pointer = this.#guarded ? this.#takeGuarded(bytes) : this.#take(bytes)
    const slot = this.#live.length
    const buffer: CudaBuffer = {
      pointer,
      bytes,
      op: this.#op,
      pool: this.#pool,
      refs: 1,
      slot,
      rounded: null,
      kind: '',
    }
    this.#live.push(buffer)
    this.#fresh.push(buffer)
    this.#handles++
    this.#bytes += bytes
    if (this.#bytes > this.#peakBytes) this.#peakBytes = this.#bytes
    return buffer
  }

  /** Memory for a constant of a graph: of everybody's pool, as the graph writes to its own at every replay. */
  allocateConstant(bytes: number): CudaBuffer {
    const pool = this.#pool
    this.#pool = this.#shared
    try {
      return this.allocate(bytes)
    } finally {
      this.#pool = pool
    }
  }

  /** One more owner. */
  share(buffer: CudaBuffer): CudaBuffer {
    buffer.refs++
    this.#handles++
    this.#fresh.push(buffer)
    return buffer
  }

  /** One owner less. */
  release(buffer: CudaBuffer): void {
    if (this.#disposed) return
    if (buffer.refs <= 0)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cuda', problem: 'a handle was freed twice' })
    this.#handles--
    if (--buffer.refs > 0) return
    const last = this.#live.pop() as CudaBuffer
    if (last !== buffer) {
      this.#live[buffer.slot] = last
      last.slot = buffer.slot
    }
    this.#bytes -= buffer.bytes
    this.changed(buffer)
    if (this.#recording && buffer.pool !== this.#pool) this.#held.push(buffer)
    else this.#giveBack(buffer)
  }

  /** Memory until the end of the op. */
  scratch(bytes: number): CudaBuffer {
    const buffer = this.allocate(bytes)
    this.#scratch.push(buffer)
    return buffer
  }

  /**
   * Where the elements of `of` lie in that form, until they change or go: products with the same operand, forward and backward, share it. It counts as no
   * tensor's. Whoever finds it not filled fills it.
   */
  rounded(of: CudaBuffer, form: string, bytes: number): { pointer: number; isFilled: boolean } {
    const known = of.rounded?.find(copy => copy.form === form)
    if (known !== undefined) {
      known.lastOp = this.#ops
      known.isUnread = false
      return { pointer: known.pointer, isFilled: true }
    }
    if (form === asItLies && of.kind !== '') this.#kindsRounded.add(of.kind)
    return { pointer: this.#addRounded(of, form, bytes, false), isFilled: false }
  }

  /**
   * Where the op that makes `output` is to write its elements in bf16, too, or 0: once another of its kind was read so, until one is not. It costs a third of reading
   * all of them again to round them. A kind is what such outputs have in common but for their number of positions, so kinds are few.
   */
  roundedBy(output: CudaBuffer, kind: string): number {
    output.kind = `${this.#op} ${kind}`
    return this.#kindsRounded.has(output.kind) ? this.#addRounded(output, asItLies, output.bytes / 2, true) : 0
  }

  #addRounded(of: CudaBuffer, form: string, bytes: number, isUnread: boolean): number {
    const pointer = this.#guarded ? this.#takeGuarded(bytes) : this.#take(bytes)
    of.rounded ??= []
    of.rounded.push({ form, pointer, bytes, pool: this.#pool, lastOp: this.#ops, isUnread })
    this.#rounded.add(of)
    return pointer
  }

  /** The elements are, or will be, others: what was made of them is given back. */
  changed(buffer: CudaBuffer): void {
    if (buffer.rounded === null) return
    for (const copy of buffer.rounded) {
      if (copy.isUnread) this.#kindsRounded.delete(buffer.kind)
      this.#giveBack(copy)
    }
    buffer.rounded = null
    this.#rounded.delete(buffer)
  }

  /** The same for all: a graph runs, which does not say what it writes to, or is recorded, and has to make everything itself. */
  allChanged(): void {
    for (const buffer of this.#rounded) this.changed(buffer)
  }

  /** Memory of the backend itself, until its end. It counts as no tensor's. */
  reserve(bytes: number): number {
    const pointer = this.#guarded ? this.#takeGuarded(bytes) : this.#take(bytes)
    this.#reserved.push({ pointer, bytes })
    return pointer
  }

  /** An op begins: what it allocates from here on is its own. */
  begin(op: string): void {
    this.#op = op
    this.#ops++
    this.#fresh.length = 0
  }

  /** The op has launched everything: its working memory is free for the next. */
  end(): void {
    for (const buffer of this.#scratch) this.release(buffer)
    this.#scratch.length = 0
  }

  /** The op failed: what it allocated is given back. */
  rollBack(): void {
    for (const buffer of this.#fresh) if (buffer.refs > 0) this.release(buffer)
    this.#fresh.length = 0
    this.#scratch.length = 0
    // What this op was to fill may be empty.
    this.allChanged()
  }

  /**
   * What `fn` allocates comes from the pool and goes back to it. What it frees of other pools is held until it ends, so that
   * `revive` can take it back.
   */
  within<T>(pool: Pool, fn: () => T): T {
    this.#pool = pool
    this.#recording = true
    try {
      return fn()
    } finally {
      this.#pool = this.#shared
      this.#recording = false
      for (const buffer of this.#held) this.#giveBack(buffer)
      this.#held.length = 0
    }
  }

  /** One owner for a buffer that was freed during `within`. */
  revive(buffer: CudaBuffer): CudaBuffer {
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
    pool.dissolved = true
    pool.free.forEach((list, index) => {
      this.#shared.free[index].push(...list)
      list.length = 0
    })
  }

  stats(): MemoryStats {
    return {
      handles: this.#handles,
      bytes: this.#bytes,
      peakBytes: this.#peakBytes,
      cachedBytes: this.#cachedBytes,
      peakReservedBytes: this.#peakReservedBytes,
    }
  }

  /** Gives what no tensor uses back to the device. The caller has waited for the stream. */
  trim(): void {
    this.#shared.free.forEach((list, index) => {
      const size = classBytes(index)
      if (size < slabBytes) return
      for (const pointer of list) {
        this.#driver.call.cuMemFree(pointer)
        this.#cachedBytes -= size
        this.#reservedBytes -= size
      }
      list.length = 0
    })
  }

  /** Gives everything back, living buffers too. Never throws: the device may be lost. */
  dispose(): void {
    if (this.#disposed) return
    const { call } = this.#driver
    call.cuStreamSynchronize(this.#stream)
    this.allChanged()
    for (const buffer of this.#live) buffer.refs = 0
    for (const { pointer, bytes } of [...this.#live, ...this.#reserved]) {
      if (this.#guarded) call.cuMemFreeAsync(pointer, this.#stream)
      else if (classBytes(sizeClass(bytes)) >= slabBytes) call.cuMemFree(pointer)
    }
    this.#live.length = this.#reserved.length = 0
    this.trim()
    for (const slab of this.#slabs) call.cuMemFree(slab)
    this.#handles = this.#bytes = 0
    this.#disposed = true
  }

  #take(bytes: number): number {
    const index = sizeClass(bytes)
    const list = this.#shared.free[index]
    const size = classBytes(index)
    // What everybody has left serves a graph as well: whoever used it did so earlier on the stream than any replay.
    const kept = this.#pool.free[index].pop() ?? list.pop()
    if (kept !== undefined) {
      this.#cachedBytes -= size
      return kept
    }
    if (size >= slabBytes) return this.#reserve(size, bytes)
    const slab = this.#reserve(slabBytes, bytes)
    this.#slabs.push(slab)
    // Handed out from the front, as a list's end is its next.
    for (let at = Math.floor(slabBytes / size) - 1; at > 0; at--) {
      list.push(slab + at * size)
      this.#cachedBytes += size
    }
    return slab
  }

  #reserve(size: number, asked: number): number {
    const word = new BigUint64Array(1)
    const { call } = this.#driver
    let code = call.cuMemAlloc(word, size)
    // While a graph is recorded, its constants included, the stream cannot be waited for.
    if (code === status.outOfMemory && !this.#recording) {
      for (const buffer of this.#rounded) {
        if (buffer.rounded?.every(({ lastOp }) => lastOp !== this.#ops)) this.changed(buffer)
      }
      call.cuStreamSynchronize(this.#stream)
      this.trim()
      code = call.cuMemAlloc(word, size)
    }
    if (code === status.outOfMemory) throw this.#exhausted(asked)
    this.#driver.check(code, this.#op, `for ${asked} bytes`)
    this.#reservedBytes += size
    if (this.#reservedBytes > this.#peakReservedBytes) this.#peakReservedBytes = this.#reservedBytes
    return Number(word[0])
  }

  #takeGuarded(bytes: number): number {
    const word = new BigUint64Array(1)
    const code = this.#driver.call.cuMemAllocAsync(word, Math.max(bytes, 1), this.#stream)
    if (code === status.outOfMemory) throw this.#exhausted(bytes)
    this.#driver.check(code, this.#op, `for ${bytes} bytes`)
    return Number(word[0])
  }

  #giveBack(buffer: Pick<CudaBuffer, 'pointer' | 'bytes' | 'pool'>): void {
    if (this.#guarded) {
      this.#driver.call.cuMemFreeAsync(buffer.pointer, this.#stream)
      return
    }
    const index = sizeClass(buffer.bytes)
    const pool = buffer.pool.dissolved ? this.#shared : buffer.pool
    pool.free[index].push(buffer.pointer)
    this.#cachedBytes += classBytes(index)
  }

  #exhausted(bytes: number): MoeError {
    const byOp = new Map<string, number>()
    for (const { op, bytes: held } of this.#live) byOp.set(op, (byOp.get(op) ?? 0) + held)
    const holders = [...byOp].sort((a, b) => b[1] - a[1]).slice(0, 5)
    const list = holders.map(([op, held]) => `${op || 'upload'} ${megabytes(held)}`).join(', ')
    return new MoeError({
      code: 'E_OUT_OF_MEMORY',
      op: this.#op || 'kernels-cuda',
      problem: `no memory for ${megabytes(bytes)} beside ${megabytes(this.#bytes)} of ${this.#live.length} tensors (made by: ${list || 'none'})`,
      fix: 'make the batch smaller, free tensors that are no longer needed, or recompute with checkpoint()',
      details: { bytes, liveBytes: this.#bytes, holders: Object.fromEntries(holders) },
    })
  }
}

const megabytes = (bytes: number) => (bytes < 2 ** 20 ? `${bytes} bytes` : `${(bytes / 2 ** 20).toFixed(1)} MiB`)

const finest = 256
const stepsPerDoubling = 8
const classes = 8 + (44 - 11) * stepsPerDoubling

export const newPool = (): Pool => ({ free: Array.from({ length: classes }, () => []), dissolved: false })

/** Classes: multiples of 256 bytes up to 2 KiB, then eight steps per doubling, so at most an eighth is wasted. */
export function sizeClass(bytes: number): number {
  if (bytes <= 2048) return bytes <= finest ? 0 : Math.ceil(bytes / finest) - 1
  const exponent = Math.floor(Math.log2(bytes - 1))
  const step = Math.floor((bytes - 1) / 2 ** (exponent - 3)) - stepsPerDoubling
  return 8 + (exponent - 11) * stepsPerDoubling + step
}

export function classBytes(index: number): number {
  if (index < 8) return (index + 1) * finest
  const exponent = 11 + Math.floor((index - 8) / stepsPerDoubling)
  return (((index - 8) % stepsPerDoubling) + 1 + stepsPerDoubling) * 2 ** (exponent - 3)
}
