/** @file A connection between ranks by NCCL, with its own stream on the device. */
import { MoeError } from '@moe/core'
import type { Message } from '../communicator/carrier.ts'
import { bytesOf, type CudaAccess, type DeviceElements, type DeviceQueue } from './device-memory.ts'
import { type NcclLibrary, numbers } from './library.ts'

/** This rank's place in a connection, whose id one of its ranks has created. */
export interface Place {
  readonly ranks: number
  readonly rank: number
  readonly id: Uint8Array
}

/** An NCCL communicator. Nothing here blocks the event loop. */
export class Connection {
  readonly #nccl: NcclLibrary
  readonly #access: CudaAccess
  readonly #comm: number
  readonly #queue: DeviceQueue
  /** The latest launch: NCCL accepts no other calls before it is done. */
  #launched: Promise<unknown> = Promise.resolve()
  #ended = false

  private constructor(nccl: NcclLibrary, access: CudaAccess, comm: number) {
    this.#nccl = nccl
    this.#access = access
    this.#comm = comm
    this.#queue = access.queue()
  }

  /** Resolves when all ranks have called it. */
  static async open(nccl: NcclLibrary, access: CudaAccess, { ranks, rank, id }: Place): Promise<Connection> {
    access.makeCurrent()
    const connection = new Connection(nccl, access, nccl.begin(ranks, rank, id))
    try {
      await connection.#ready('begin')
    } catch (error) {
      connection.#abort()
      throw error
    }
    return connection
  }

  /**
   * Sends and receives several messages at once. They wait for work that the backend has already launched; later work of the backend does not wait for them. Resolves when they are
   * complete.
   */
  async carry(messages: ReadonlyArray<Message<DeviceElements>>): Promise<void> {
    const launched = this.#launched.then(() => this.#launch(messages))
    this.#launched = launched.catch(() => undefined)
    await launched
    if (messages.length === 0) return
    try {
      await this.#queue.synchronize(() => this.#checkState('messages'))
    } catch (error) {
      this.#abort()
      throw error
    }
  }

  async close(): Promise<void> {
    await this.#launched
    if (this.#ended) return
    this.#ended = true
    const { call, check } = this.#nccl
    this.#access.makeCurrent()
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
        fix: 'close the communicator after the last call; after a failure, end all ranks',
      })
    }
    if (messages.length === 0) return
    const { call, check } = this.#nccl
    this.#access.makeCurrent()
    this.#queue.waitForBackend()
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

  /** Polls on every turn of the event loop until the latest call has completed. */
  async #ready(op: string): Promise<void> {
    while (this.#checkState(op) === numbers.inProgress) await new Promise(resolve => setImmediate(resolve))
  }

  /** Leaves the backend's context current. @throws MoeError E_BACKEND after an NCCL error, for example if another rank has exited */
  #checkState(op: string): number {
    // Another backend on this thread may have made its context current.
    this.#access.makeCurrent()
    const state = new Int32Array(1)
    this.#nccl.check(this.#nccl.call.ncclCommGetAsyncError(this.#comm, state), op, this.#comm)
    this.#nccl.check(state[0], op, this.#comm)
    return state[0]
  }

  /** Aborts messages in progress, so that the device does not wait forever. */
  #abort(): void {
    if (this.#ended) return
    this.#ended = true
    this.#nccl.call.ncclCommAbort(this.#comm)
    this.#queue.dispose()
  }
}
