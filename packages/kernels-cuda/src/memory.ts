/**
 * @file Device memory: a caching allocator, and buffers with owners.
 *
 * Everything runs on one stream, so a buffer that is freed while kernels still use it can be handed out again at once: whoever
 * gets it writes to it later on the same stream.
 */
import { type BackendStats, MoeError } from '@moe/core'
import type { Driver } from './driver/driver.ts'
import { status } from './driver/status.ts'

/** A piece of device memory, which tensors may share. */
export interface CudaBuffer {
  readonly pointer: number
  /** The requested size. */
  readonly bytes: number
  /** The op that allocated it. */
  readonly op: string
  readonly pool: Pool
  refs: number
  /** Index in the list of live buffers. */
  slot: number
  /** Cached copies of its elements in a smaller dtype, valid until the elements change. */
  rounded: RoundedCopy[] | null
  /** The kind of output, as passed to `roundedBy`, or ''. */
  kind: string
}

/** A copy in a smaller dtype; `form` identifies its dtype and layout. */
interface RoundedCopy {
  readonly form: string
  readonly pointer: number
  readonly bytes: number
  readonly pool: Pool
  /** Number of the op that used it last. */
  lastOp: number
  /** Whether it was written together with its tensor and has not been read yet. */
  isUnread: boolean
}

/** The form of a contiguous bf16 copy, element by element in the order of the tensor. */
export const contiguousForm = 'bf16'

/** Freed pieces by size class. A captured graph has its own pool, so that nobody else writes to the memory in which it computes. */
export interface Pool {
  readonly free: number[][]
  /** Whether its graph has been disposed: memory that is returned later goes to the shared pool. */
  dissolved: boolean
}

/** Memory use of a backend, including its cache. */
export interface MemoryStats extends BackendStats {
  /** Bytes cached for later tensors. */
  readonly cachedBytes: number
  /** Peak number of bytes taken from the device, including the cache. */
  readonly peakReservedBytes: number
}

export interface MemoryOptions {
  /** Maximum total size of all tensors in bytes. */
  readonly limit?: number | undefined
  /** Makes every buffer a separate allocation, so that a checker (the emulator, compute-sanitizer) knows its bounds. Slow. */
  readonly guarded?: boolean | undefined
}

/** Smaller pieces are cut from slabs of this size, because an allocation by the driver takes microseconds. */
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
  /** Buffers with a cached copy. */
  readonly #rounded = new Set<CudaBuffer>()
  /** Kinds of outputs that are read in bf16. */
  readonly #kindsRounded = new Set<string>()
  readonly #reserved: Array<{ readonly pointer: number; readonly bytes: number }> = []
  readonly #shared: Pool = newPool()
  /** Pools of graphs that have not been disposed. */
  readonly #pools = new Set<Pool>()
  /** Slabs, which stay divided; they are freed with the backend. */
  readonly #slabs: number[] = []
  #pool = this.#shared
  #recording = false
  #op = ''
  /** Number of ops so far. */
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

  /** Whether every buffer is a separate allocation. */
  get guarded(): boolean {
    return this.#guarded
  }

  /** The op that is running, or ran last. */
  get op(): string {
    return this.#op
  }

  /** Uninitialized memory with one owner. @throws MoeError E_OUT_OF_MEMORY */
  allocate(bytes: number): CudaBuffer {
    if (this.#disposed)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cuda', problem: 'the backend has been disposed' })
    if (this.#bytes + bytes > this.#limit) throw this.#exhausted(bytes)
    const pointer = this.#guarded ? this.#takeGuarded(bytes) : this.#take(bytes)
    const buffer: CudaBuffer = {
      pointer,
      bytes,
      op: this.#op,
      pool: this.#pool,
      refs: 0,
      slot: 0,
      rounded: null,
      kind: '',
    }
    this.#fresh.push(buffer)
    return this.#own(buffer)
  }

  /** Gives a buffer that has no owner its first one. */
  #own(buffer: CudaBuffer): CudaBuffer {
    buffer.refs = 1
    buffer.slot = this.#live.length
    this.#live.push(buffer)
    this.#handles++
    this.#bytes += buffer.bytes
    if (this.#bytes > this.#peakBytes) this.#peakBytes = this.#bytes
    return buffer
  }

  /** Memory for a constant of a graph. It comes from the shared pool, because the graph overwrites its own pool at every replay. */
  allocateConstant(bytes: number): CudaBuffer {
    const pool = this.#pool
    this.#pool = this.#shared
    try {
      return this.allocate(bytes)
    } finally {
      this.#pool = pool
    }
  }

  /** Adds an owner. */
  share(buffer: CudaBuffer): CudaBuffer {
    buffer.refs++
    this.#handles++
    this.#fresh.push(buffer)
    return buffer
  }

  /** Removes an owner, and frees the buffer with the last one. */
  release(buffer: CudaBuffer): void {
    if (this.#disposed) return
    if (buffer.refs <= 0)
      throw new MoeError({ code: 'E_DISPOSED', op: 'kernels-cuda', problem: 'this handle has already been freed' })
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

  /** Memory that is freed at the end of the op. */
  scratch(bytes: number): CudaBuffer {
    const buffer = this.allocate(bytes)
    this.#scratch.push(buffer)
    return buffer
  }

  /**
   * Address of a copy of the elements of `of` in this form, cached until they change or are freed. All products with this operand, forward and
   * backward, share it. It does not count as a tensor's memory. If it is not filled, the caller has to fill it.
   */
  rounded(of: CudaBuffer, form: string, bytes: number): { pointer: number; isFilled: boolean } {
    const known = of.rounded?.find(copy => copy.form === form)
    if (known !== undefined) {
      known.lastOp = this.#ops
      known.isUnread = false
      return { pointer: known.pointer, isFilled: true }
    }
    if (form === contiguousForm && of.kind !== '') this.#kindsRounded.add(of.kind)
    return { pointer: this.#addRounded(of, form, bytes, false), isFilled: false }
  }

  /**
   * Address to which the op that computes `output` should also write its elements in bf16, or 0. This starts once a tensor of the same kind has
   * been read in bf16 and ends when such a copy goes unread. It costs a third of reading and rounding the elements later. Outputs of the same op that
   * differ only in their number of positions are of the same kind, so there are few.
   */
  roundedBy(output: CudaBuffer, kind: string): number {
    output.kind = `${this.#op} ${kind}`
    return this.#kindsRounded.has(output.kind) ? this.#addRounded(output, contiguousForm, output.bytes / 2, true) : 0
  }

  #addRounded(of: CudaBuffer, form: string, bytes: number, isUnread: boolean): number {
    const pointer = this.#guarded ? this.#takeGuarded(bytes) : this.#take(bytes)
    of.rounded ??= []
    of.rounded.push({ form, pointer, bytes, pool: this.#pool, lastOp: this.#ops, isUnread })
    this.#rounded.add(of)
    return pointer
  }

  /** Frees the cached copies of a buffer whose elements have changed or are about to. */
  changed(buffer: CudaBuffer): void {
    if (buffer.rounded === null) return
    for (const copy of buffer.rounded) {
      if (copy.isUnread) this.#kindsRounded.delete(buffer.kind)
      this.#giveBack(copy)
    }
    buffer.rounded = null
    this.#rounded.delete(buffer)
  }

  /** Frees all cached copies: before a graph runs, as it may write to any buffer, and around its capture, as it must create its own. */
  allChanged(): void {
    for (const buffer of this.#rounded) this.changed(buffer)
  }

  /** Memory for the backend itself, kept until it is disposed. It does not count as a tensor's memory. */
  reserve(bytes: number): number {
    const pointer = this.#guarded ? this.#takeGuarded(bytes) : this.#take(bytes)
    this.#reserved.push({ pointer, bytes })
    return pointer
  }

  /** Starts an op: later allocations belong to it. */
  begin(op: string): void {
    this.#op = op
    this.#ops++
    this.#fresh.length = 0
  }

  /** Ends an op: all its kernels have been launched, and its scratch memory can be reused. */
  end(): void {
    for (const buffer of this.#scratch) this.release(buffer)
    this.#scratch.length = 0
  }

  /** Frees what a failed op has allocated. */
  rollBack(): void {
    for (const buffer of this.#fresh) if (buffer.refs > 0) this.release(buffer)
    this.#fresh.length = 0
    this.#scratch.length = 0
    // Copies that this op should have filled may be empty.
    this.allChanged()
  }

  /**
   * Runs `fn` with allocations from this pool. Buffers of other pools that `fn` frees are held until it ends, so that `revive` can restore
   * them.
   */
  within<T>(pool: Pool, fn: () => T): T {
    this.#pools.add(pool)
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

  /** Adds an owner to a buffer that was freed during `within`. */
  revive(buffer: CudaBuffer): CudaBuffer {
    const at = this.#held.indexOf(buffer)
    if (at < 0) return this.share(buffer)
    this.#held.splice(at, 1)
    return this.#own(buffer)
  }

  /** Moves a pool's memory to the shared pool. */
  dissolve(pool: Pool): void {
    pool.dissolved = true
    this.#pools.delete(pool)
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

  /** Returns cached memory to the device. The caller has waited for the stream. */
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

  /** Frees all memory, including live buffers. Never throws, because the device may be lost. */
  dispose(): void {
    if (this.#disposed) return
    const { call } = this.#driver
    call.cuStreamSynchronize(this.#stream)
    this.allChanged()
    for (const { pointer, bytes } of [...this.#live, ...this.#reserved]) {
      if (this.#guarded) call.cuMemFreeAsync(pointer, this.#stream)
      else if (classBytes(sizeClass(bytes)) >= slabBytes) call.cuMemFree(pointer)
    }
    this.#live.length = this.#reserved.length = 0
    for (const pool of this.#pools) this.dissolve(pool)
    this.trim()
    for (const slab of this.#slabs) call.cuMemFree(slab)
    this.#handles = this.#bytes = this.#cachedBytes = 0
    this.#disposed = true
  }

  #take(bytes: number): number {
    const index = sizeClass(bytes)
    const list = this.#shared.free[index]
    const size = classBytes(index)
    // The shared pool's memory serves a graph too: its earlier uses precede any replay on the stream.
    const kept = this.#pool.free[index].pop() ?? list.pop()
    if (kept !== undefined) {
      this.#cachedBytes -= size
      return kept
    }
    if (size >= slabBytes) return this.#reserve(size, bytes)
    const slab = this.#reserve(slabBytes, bytes)
    this.#slabs.push(slab)
    // Pushed in reverse, because memory is taken from the end of the list.
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
    // During a capture, including for its constants, the stream cannot be waited for.
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
    for (const { op, bytes: held } of this.#live) {
      const name = op || 'upload'
      byOp.set(name, (byOp.get(name) ?? 0) + held)
    }
    const holders = [...byOp].sort((a, b) => b[1] - a[1]).slice(0, 5)
    const list = holders.map(([op, held]) => `${op} ${megabytes(held)}`).join(', ')
    return new MoeError({
      code: 'E_OUT_OF_MEMORY',
      op: this.#op || 'kernels-cuda',
      problem: `cannot allocate ${megabytes(bytes)}: ${this.#live.length} tensors already use ${megabytes(this.#bytes)} (allocated by: ${list || 'none'})`,
      fix: 'use a smaller batch, free tensors that are no longer needed, or recompute with checkpoint()',
      details: { bytes, liveBytes: this.#bytes, holders: Object.fromEntries(holders) },
    })
  }
}

const megabytes = (bytes: number) => (bytes < 2 ** 20 ? `${bytes} bytes` : `${(bytes / 2 ** 20).toFixed(1)} MiB`)

const finest = 256
const stepsPerDoubling = 8
const classes = 8 + (44 - 11) * stepsPerDoubling

export const newPool = (): Pool => ({ free: Array.from({ length: classes }, () => []), dissolved: false })

/** Size classes: multiples of 256 bytes up to 2 KiB, then eight per doubling, so that at most an eighth is wasted. */
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
