/** @file The stream on which everything runs: launches, copies, and waiting without blocking the event loop. */
import { type HostArray, MoeError } from '@moe/core'
import type { Context } from './driver/context.ts'
import type { Device } from './driver/device.ts'
import type { Driver } from './driver/driver.ts'
import { status } from './driver/status.ts'
import type { Launch } from './modules.ts'

/**
 * Uploads of these sizes are staged in our own pinned memory, so that nothing waits: a batch of tokens, for example. The driver stages up to 64 KiB
 * itself; with more, it may wait for the stream first. Larger uploads, or ones beyond `atOnce`, are usually weights, for which waiting is acceptable.
 */
const setAside = { least: 2 ** 16, most: 2 ** 22, atOnce: 16 }

export const flags = { streamNonBlocking: 1, eventDisableTiming: 2 } as const

export class Stream {
  readonly handle: number
  readonly #driver: Driver
  readonly #context: Context
  readonly #readsHostMemory: boolean
  readonly #pinned: PinnedPool
  readonly #events: number[] = []
  /** Uploads in progress, oldest first. */
  readonly #staged: Array<{ readonly piece: Pinned; readonly event: number }> = []
  #launches = 0
  #disposed = false
  /** Milliseconds of the latest long wait, by what it waited for. */
  readonly #waits = new Map<string, number>()

  constructor(driver: Driver, context: Context, { readsHostMemory }: Pick<Device, 'readsHostMemory'>) {
    this.#driver = driver
    this.#context = context
    this.#readsHostMemory = readsHostMemory
    this.handle = driver.out(word => driver.call.cuStreamCreate(word, flags.streamNonBlocking), 'kernels-cuda')
    this.#pinned = new PinnedPool(driver)
  }

  /** Number of kernels launched so far. */
  get launches(): number {
    return this.#launches
  }

  launch(launch: Launch): void {
    const { kernel, grid, block, shared } = launch
    const code = this.#driver.call.cuLaunchKernel(
      launch.function,
      grid[0],
      grid[1],
      grid[2],
      block,
      1,
      1,
      shared,
      this.handle,
      launch.arguments,
      0,
    )
    if (code !== status.success) {
      this.#driver.check(
        code,
        kernel,
        `launching ${grid.join(' x ')} blocks of ${block} threads, ${shared} bytes of shared memory`,
      )
    }
    this.#launches++
  }

  /** Counts a kernel that a library has launched on this stream. */
  countLaunch(): void {
    this.#launches++
  }

  /** Copies host memory to the device. The array may be changed as soon as this returns. */
  upload(to: number, data: ArrayBufferView, op: string): void {
    const bytes = data.byteLength
    if (bytes === 0) return
    const { call } = this.#driver
    const context = `copying ${bytes} bytes to the device`
    const copy = (from: ArrayBufferView | number) =>
      this.#driver.check(call.cuMemcpyHtoDAsync(to, from, bytes, this.handle), op, context)
    this.#reclaim()
    const least = this.#readsHostMemory ? 0 : setAside.least
    if (bytes <= least || bytes > setAside.most || this.#staged.length >= setAside.atOnce) {
      // If the driver has to stage ordinary memory, it does so within this call.
      copy(data)
      if (this.#readsHostMemory) this.#driver.check(call.cuStreamSynchronize(this.handle), op, context)
      return
    }
    const piece = this.#pinned.take(bytes, op)
    const event = this.#event(op)
    this.#staged.push({ piece, event })
    piece.bytes.set(new Uint8Array(data.buffer, data.byteOffset, bytes))
    copy(piece.address)
    this.#driver.check(call.cuEventRecord(event, this.handle), op)
  }

  /** Reclaims the staging memory of finished uploads. */
  #reclaim(): void {
    while (this.#staged.length > 0) {
      const { piece, event } = this.#staged[0]
      if (this.#driver.call.cuEventQuery(event) === status.notReady) return
      this.#staged.shift()
      this.#pinned.giveBack(piece)
      this.#events.push(event)
    }
  }

  /** Copies device memory into `data` after all work so far. */
  async download(from: number, data: HostArray): Promise<void> {
    const bytes = data.byteLength
    if (bytes === 0) return
    const pinned = this.#pinned.take(bytes, 'download')
    try {
      const code = this.#driver.call.cuMemcpyDtoHAsync(pinned.address, from, bytes, this.handle)
      this.#driver.check(code, 'download', `copying ${bytes} bytes from the device`)
      await this.#settled('download')
      // Other code may have run since, even if the first query found the work finished.
      this.#assertOpen('download')
      new Uint8Array(data.buffer, data.byteOffset, bytes).set(pinned.bytes.subarray(0, bytes))
    } finally {
      if (!this.#disposed) {
        this.#context.use()
        this.#pinned.giveBack(pinned)
      }
    }
  }

  copy(to: number, from: number, bytes: number): void {
    if (bytes === 0) return
    this.#driver.check(this.#driver.call.cuMemcpyDtoDAsync(to, from, bytes, this.handle), 'copy', `of ${bytes} bytes`)
  }

  clear(pointer: number, bytes: number): void {
    if (bytes === 0) return
    this.#driver.check(this.#driver.call.cuMemsetD8Async(pointer, 0, bytes, this.handle), 'clear', `of ${bytes} bytes`)
  }

  /** Resolves to the milliseconds on the device from the first to the last work that `fn` launches. */
  async elapsed(fn: () => void): Promise<number> {
    const { call } = this.#driver
    const events = [0, 0].map(() => this.#driver.out(word => call.cuEventCreate(word, 0), 'elapsed'))
    try {
      this.#driver.check(call.cuEventRecord(events[0], this.handle), 'elapsed')
      fn()
      this.#driver.check(call.cuEventRecord(events[1], this.handle), 'elapsed')
      await this.#settled('elapsed')
      this.#context.use()
      const milliseconds = new Float32Array(1)
      this.#driver.check(call.cuEventElapsedTime(milliseconds, events[0], events[1]), 'elapsed')
      return milliseconds[0]
    } finally {
      if (!this.#disposed) for (const event of events) call.cuEventDestroy(event)
    }
  }

  /** The same, but blocks until the device is done. */
  milliseconds(fn: () => void): number {
    const { call } = this.#driver
    const check = (code: number) => this.#driver.check(code, 'measuring')
    const events = [0, 0].map(() => this.#driver.out(word => call.cuEventCreate(word, 0), 'measuring'))
    try {
      check(call.cuEventRecord(events[0], this.handle))
      fn()
      check(call.cuEventRecord(events[1], this.handle))
      check(call.cuStreamSynchronize(this.handle))
      const milliseconds = new Float32Array(1)
      check(call.cuEventElapsedTime(milliseconds, events[0], events[1]))
      return milliseconds[0]
    } finally {
      for (const event of events) call.cuEventDestroy(event)
    }
  }

  /** @throws MoeError E_DISPOSED after `dispose`, when the stream, its events and its pinned memory are gone */
  #assertOpen(op: string): void {
    if (this.#disposed)
      throw new MoeError({ code: 'E_DISPOSED', op, problem: 'the backend, or its queue, has been disposed' })
  }

  #event(op: string): number {
    const create = (word: BigUint64Array) => this.#driver.call.cuEventCreate(word, flags.eventDisableTiming)
    return this.#events.pop() ?? this.#driver.out(create, op)
  }

  /** Waits for all work so far. `look` is called before each query of the device; if it throws, waiting ends with that error. */
  async sync(look?: () => void): Promise<void> {
    await this.#settled('sync', look)
  }

  /** Makes later work on this stream wait for all work on another. */
  follow(other: Stream): void {
    this.#assertOpen('follow')
    const event = this.#event('follow')
    this.#driver.check(this.#driver.call.cuEventRecord(event, other.handle), 'follow')
    this.#driver.check(this.#driver.call.cuStreamWaitEvent(this.handle, event, 0), 'follow')
    // A wait refers to the event's latest record at the time of the call.
    this.#events.push(event)
  }

  /** Waits for all work and frees everything. Never throws, because the device may be lost. */
  dispose(): void {
    if (this.#disposed) return
    const { call } = this.#driver
    this.#disposed = true
    call.cuStreamSynchronize(this.handle)
    for (const event of [...this.#events, ...this.#staged.map(({ event }) => event)]) call.cuEventDestroy(event)
    this.#events.length = this.#staged.length = 0
    this.#pinned.dispose()
    call.cuStreamDestroy(this.handle)
  }

  /**
   * Polls the device, each time after other work of the event loop. After two milliseconds it polls once per millisecond, except around the time
   * at which the last such wait ended: training steps take the same time each, and the device would be idle until the next query.
   */
  async #settled(op: string, look?: () => void): Promise<void> {
    this.#assertOpen(op)
    const { call } = this.#driver
    const event = this.#event(op)
    try {
      this.#driver.check(call.cuEventRecord(event, this.handle), op)
      const started = performance.now()
      const usual = this.#waits.get(op) ?? 0
      let code = call.cuEventQuery(event)
      while (code === status.notReady) {
        const waited = performance.now() - started
        const soon = waited > 0.95 * usual - 1 && waited < 1.05 * usual + 1
        if (waited < 2 || soon) await new Promise(resolve => setImmediate(resolve))
        else await new Promise(resolve => setTimeout(resolve, 1))
        this.#assertOpen(op)
        look?.()
        // Another backend on this thread may have made its context current, or have been disposed while it was.
        this.#context.use()
        code = call.cuEventQuery(event)
      }
      const waited = performance.now() - started
      if (waited > 2) this.#waits.set(op, waited)
      this.#driver.check(code, op, 'waiting for earlier work')
    } finally {
      if (!this.#disposed) this.#events.push(event)
    }
  }
}

interface Pinned {
  readonly address: number
  readonly bytes: Uint8Array
}

/** Pinned host memory. Cached pieces have sizes of powers of two. */
class PinnedPool {
  readonly #driver: Driver
  readonly #free: Pinned[] = []
  /** Addresses of all pieces, including those in use. */
  readonly #all = new Set<number>()
  /** Larger pieces are not cached. */
  static readonly #most = 2 ** 26

  constructor(driver: Driver) {
    this.#driver = driver
  }

  take(bytes: number, op: string): Pinned {
    const index = this.#free.findIndex(piece => piece.bytes.length >= bytes)
    if (index >= 0) return this.#free.splice(index, 1)[0]
    const size = bytes > PinnedPool.#most ? bytes : Math.max(4096, 2 ** Math.ceil(Math.log2(bytes)))
    const word = new BigUint64Array(1)
    const code = this.#driver.call.cuMemHostAlloc(word, size, 0)
    if (code === status.outOfMemory) throw noHostMemory(op, size)
    this.#driver.check(code, op, `for ${size} bytes of pinned host memory`)
    const address = Number(word[0])
    this.#all.add(address)
    return { address, bytes: this.#driver.view(address, size) }
  }

  giveBack(piece: Pinned): void {
    if (piece.bytes.length > PinnedPool.#most) {
      this.#driver.call.cuMemFreeHost(piece.address)
      this.#all.delete(piece.address)
      return
    }
    this.#free.push(piece)
    this.#free.sort((a, b) => a.bytes.length - b.bytes.length)
  }

  dispose(): void {
    for (const address of this.#all) this.#driver.call.cuMemFreeHost(address)
    this.#free.length = 0
    this.#all.clear()
  }
}

function noHostMemory(op: string, bytes: number): MoeError {
  return new MoeError({
    code: 'E_OUT_OF_MEMORY',
    op,
    problem: `the system has no ${bytes} bytes of pinned host memory, through which tensors are copied`,
    fix: 'free memory of the host, or raise the memory limit of the container',
    details: { bytes },
  })
}
