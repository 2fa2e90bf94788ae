/** @file Ranks that NCCL connects, with a queue of their own on the device. */
import { MoeError } from '@moe/core'
import type { Message } from '../communicator/carrier.ts'
import { bytesOf, type CudaAccess, type DeviceElements, type DeviceQueue } from './device-memory.ts'
import { type NcclLibrary, numbers } from './library.ts'

/** Who meets whom: this rank of so many, by an id that one of them has made. */
export interface Place {
  readonly ranks: number
  readonly rank: number
  readonly id: Uint8Array
}

/** One communicator of NCCL. Nothing here holds up the event loop. */
export class Connection {
  readonly #nccl: NcclLibrary
  readonly #access: CudaAccess
  readonly #comm: number
  readonly #queue: DeviceQueue
  /** The latest messages that have left: NCCL takes no more before they have. */
  #left: Promise<unknown> = Promise.resolve()
  #ended = false

  private constructor(nccl: NcclLibrary, access: CudaAccess, comm: number) {
    this.#nccl = nccl
    this.#access = access
    this.#comm = comm
    this.#queue = access.queue()
  }

  /** Resolves when all ranks have called it. */
  static async open(nccl: NcclLibrary, access: CudaAccess, { ranks, rank, id }: Place): Promise<Connection> {
    access.use()
    const connection = new Connection(nccl, access, nccl.begin(ranks, rank, id))
    await connection.#ready('begin')
    return connection
  }

  /** Messages at once. They wait for what the backend has launched, and nothing of the backend waits for them: resolves when they are through. */
  async carry(messages: ReadonlyArray<Message<DeviceElements>>): Promise<void> {
    const left = this.#left.then(() => this.#launch(messages))
    this.#left = left.catch(() => undefined)
    await left
    if (messages.length === 0) return
    try {
      await this.#queue.done(() => this.#look('messages'))
    } catch (error) {
      this.#abort()
      throw error
    }
  }

  async close(): Promise<void> {
    await this.#left
    if (this.#ended) return
    this.#ended = true
    const { call, check } = this.#nccl
    this.#access.use()
    check(call.ncclCommFinalize(this.#comm), 'close', this.#comm)
    await this.#ready('close')
    check(call.ncclCommDestroy(this.#comm), 'close', this.#comm)
    this.#queue.dispose()
  }

  async #launch(messages: ReadonlyArray<Message<DeviceElements>>): Promise<void> {
    if (this.#ended) {
      const problem = 'the ranks are no longer connected'
      throw new MoeError({
        code: 'E_ABORTED',
        op: 'nccl messages',
        problem,
        fix: 'close them last; after a failure end all ranks',
      })
    }
    if (messages.length === 0) return
    const { call, check } = this.#nccl
    this.#access.use()
    this.#queue.follow()
    try {
      check(call.ncclGroupStart(), 'messages')
      try {
        for (const message of messages) {
          const { elements } = message
          const [start, peer] = 'to' in message ? [call.ncclSend, message.to] : [call.ncclRecv, message.from]
          const result = start(elements.pointer, bytesOf(elements), numbers.bytes, peer, this.#comm, this.#queue.handle)
          check(result, 'messages', this.#comm)
        }
      } finally {
        check(call.ncclGroupEnd(), 'messages', this.#comm)
      }
      await this.#ready('messages')
    } catch (error) {
      this.#abort()
      throw error
    }
  }

  /** Waits until the latest call is through, at every turn of the event loop. */
  async #ready(op: string): Promise<void> {
    while (this.#look(op) === numbers.inProgress) {
      await new Promise(resolve => setImmediate(resolve))
      // Another backend of this thread may have had its turn.
      this.#access.use()
    }
  }

  /** @throws MoeError E_BACKEND after an error of NCCL, as when another rank is gone */
  #look(op: string): number {
    const state = new Int32Array(1)
    this.#nccl.check(this.#nccl.call.ncclCommGetAsyncError(this.#comm, state), op, this.#comm)
    this.#nccl.check(state[0], op, this.#comm)
    return state[0]
  }

  /** Ends what is under way, so that the device does not wait for ever. */
  #abort(): void {
    if (this.#ended) return
    this.#ended = true
    this.#nccl.call.ncclCommAbort(this.#comm)
    this.#queue.dispose()
  }
}
