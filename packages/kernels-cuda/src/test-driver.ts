/** @file For tests: a driver whose memory only exists as addresses. It keeps books and does nothing else. */
import type { Driver } from './driver/driver.ts'
import { driverError, status } from './driver/status.ts'

type Word = BigUint64Array

export class FakeDriver {
  /** Allocations by address, in bytes. */
  readonly blocks = new Map<number, number>()
  /** Sizes of all allocations so far. */
  readonly taken: number[] = []
  limit = Number.POSITIVE_INFINITY
  /** Streams that were waited for. */
  readonly waits: number[] = []
  /** Status that the next call of a function returns. */
  readonly failures = new Map<string, number>()
  /** Pinned host memory by address. */
  readonly pinned = new Map<number, Uint8Array>()
  /** Events, with the number of their latest record. */
  readonly events = new Map<number, number>()
  #records = 0
  #finished = 0
  /** Host memory by address. */
  readonly buffers = new Map<number, ArrayBufferLike>()
  /** What was done with modules and kernels. */
  readonly log: string[] = []
  /** Names of modules and kernels by handle. */
  readonly #names: string[] = ['']
  #next = 2 ** 40
  // Buffers are aligned to 16 bytes only.
  #nextBuffer = 2 ** 45 + 16
  #nextHandle = 1

  get bytes(): number {
    return [...this.blocks.values()].reduce((sum, bytes) => sum + bytes, 0)
  }

  /** Whether these bytes are part of one allocation. */
  contains(pointer: number, bytes: number): boolean {
    for (const [start, size] of this.blocks) if (start <= pointer && pointer + bytes <= start + size) return true
    return false
  }

  /** Finishes the work before this many more records of events; default: all. */
  finish(records = this.#records - this.#finished): void {
    this.#finished += records
  }

  /** Replaces a function of the driver. */
  on(name: keyof Driver['call'], run: (...args: unknown[]) => number): void {
    this.#functions[name] = run
  }

  readonly call = new Proxy({} as Driver['call'], {
    get:
      (_, name: string) =>
      (...args: never[]) => {
        const failure = this.failures.get(name)
        this.failures.delete(name)
        if (failure !== undefined) return failure
        const own = this.#functions[name]
        if (own === undefined) throw new Error(`unexpected call of ${name}`)
        return own(...args)
      },
  })

  readonly #allocate = (word: Word, bytes: number) => {
    if (bytes === 0) return 1
    if (this.bytes + bytes > this.limit) return status.outOfMemory
    word[0] = BigInt(this.#next)
    this.blocks.set(this.#next, bytes)
    this.taken.push(bytes)
    // Blocks are nearly adjacent, as a device's may be, but must be treated as separate.
    this.#next += Math.ceil(bytes / 256) * 256
    return status.success
  }
  readonly #free = (pointer: number) => {
    if (!this.blocks.delete(pointer)) throw new Error(`${pointer} is not allocated`)
    return status.success
  }
  readonly #functions: Record<string, (...args: never[]) => number> = {
    cuMemAlloc: this.#allocate,
    cuMemFree: this.#free,
    cuMemAllocAsync: this.#allocate,
    cuMemFreeAsync: this.#free,
    cuMemHostAlloc: (word: Word, bytes: number) => {
      word[0] = BigInt(this.#next)
      this.pinned.set(this.#next, new Uint8Array(bytes))
      this.#next += bytes
      return status.success
    },
    cuMemFreeHost: (pointer: number) => (this.pinned.delete(pointer) ? status.success : 1),
    cuStreamCreate: (word: Word) => this.#handle(word),
    cuStreamDestroy: () => status.success,
    cuEventCreate: (word: Word) => {
      this.#handle(word)
      this.events.set(Number(word[0]), 0)
      return status.success
    },
    cuEventDestroy: (event: number) => (this.events.delete(event) ? status.success : 1),
    cuEventRecord: (event: number, stream: number) => {
      this.events.set(event, ++this.#records)
      return this.#note(`record ${stream}`)
    },
    cuEventQuery: (event: number) =>
      (this.events.get(event) as number) <= this.#finished ? status.success : status.notReady,
    // The number of records from one to the other, doubled.
    cuEventElapsedTime: (to: Float32Array, start: number, end: number) => {
      to[0] = 2 * ((this.events.get(end) as number) - (this.events.get(start) as number))
      return status.success
    },
    cuStreamWaitEvent: (stream: number) => this.#note(`wait ${stream}`),
    cuModuleLoadData: (word: Word, image: Uint8Array) => this.#named(word, 'load', new TextDecoder().decode(image)),
    cuModuleUnload: (module: number) => this.#note(`unload ${this.#names[module]}`),
    cuModuleGetFunction: (word: Word, _: number, name: string) => this.#named(word, 'get', name),
    cuFuncSetAttribute: (entry: number, attribute: number, value: number) =>
      this.#note(`${this.#names[entry]} attribute ${attribute} = ${value}`),
    cuStreamSynchronize: (stream: number) => {
      this.waits.push(stream)
      return status.success
    },
  }

  #note(what: string): number {
    this.log.push(what)
    return status.success
  }

  #handle(word: Word): number {
    word[0] = BigInt(this.#nextHandle++)
    return status.success
  }

  #named(word: Word, what: string, name: string): number {
    word[0] = BigInt(this.#names.push(name) - 1)
    return this.#note(`${what} ${name}`)
  }

  /** The interface that the code under test uses. */
  readonly driver: Driver = {
    path: 'fake',
    call: this.call,
    has: () => true,
    check: (code, op, context = '') => {
      if (code !== status.success) throw driverError(op, code, 'CUDA_ERROR', context, '')
    },
    errorName: () => 'CUDA_ERROR',
    out: (run: (word: Word) => number, op, context) => {
      const word = new BigUint64Array(1)
      this.driver.check(run(word), op, context)
      return Number(word[0])
    },
    address: buffer => {
      const address = this.#nextBuffer
      this.#nextBuffer += 2 ** 16
      this.buffers.set(address, buffer)
      return address
    },
    view: address => this.pinned.get(address) as Uint8Array,
    report: () => '',
  }
}
