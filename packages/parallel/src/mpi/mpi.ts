/** @file Ranks as processes that an MPI launcher has started (mpirun, mpiexec): messages through the MPI library. */
import { checkOptions, MoeError } from '@moe/core'
import type { Communicator } from '../communicator/communicator.ts'
import { overHost } from '../communicator/host-carrier.ts'
import { type Transport, wrongLength } from '../communicator/transport.ts'
import { type MpiLibrary, openMpi } from './library.ts'

/** MPI counts in 32-bit integers. */
const largestMessage = 1 << 30

/** MPI can be begun once in a process. */
let opened: Promise<Communicator> | undefined

/**
 * This process among those that `mpirun` has started; every call in a process gives the same communicator. Alone, without a launcher, it is the only rank.
 *
 * Messages are under way while the event loop goes on; a rank that waits asks MPI at every turn of it, and so keeps a core busy, as MPI programs do.
 * `close()` when all is done (MPI_Finalize), and not after a failure: launchers end the other ranks when one ends without it.
 * @param options.library path of the MPI library; default: MOE_MPI_LIBRARY, or what the launcher suggests
 * @throws MoeError E_NO_BACKEND without MPI, E_CONFIG when launcher and library are of different kinds
 */
export function mpi(options: { library?: string } = {}): Promise<Communicator> {
  checkOptions('mpi', options, { library: true })
  opened ??= openMpi(options.library).then(
    library => overHost(new MpiTransport(library)),
    error => {
      opened = undefined
      throw error
    },
  )
  return opened
}

/** A message under way. */
interface Pending {
  /** Memory that MPI reads or writes until it is done. */
  readonly bytes: Uint8Array
  readonly op: 'send' | 'receive'
  readonly request: BigUint64Array
  readonly done: () => void
  readonly fail: (error: unknown) => void
}

/** A message that has been asked for and has not come. */
type Wanted = Omit<Pending, 'op' | 'request'>

/** Messages from one rank on one lane are received in the order in which they were asked for. */
interface Way {
  readonly from: number
  readonly lane: number
  readonly wanted: Wanted[]
}

class MpiTransport implements Transport {
  readonly rank: number
  readonly size: number
  readonly #mpi: MpiLibrary
  readonly #pending = new Set<Pending>()
  readonly #ways: Way[] = []
  #watching = false
  readonly #word = new Int32Array(1)
  /** An MPI_Status: 20 bytes in MPICH, 24 in Open MPI. */
  readonly #status = new Uint8Array(256)
  #closed = false

  constructor(mpi: MpiLibrary) {
    this.#mpi = mpi
    const { call, world } = mpi
    // MPI_THREAD_SINGLE: all calls are made by this thread.
    mpi.check(call.initThread(null, null, 0, this.#word), 'init')
    mpi.check(call.setErrorHandler(world, mpi.errorsReturn), 'init')
    mpi.check(call.rank(world, this.#word), 'rank')
    this.rank = this.#word[0]
    mpi.check(call.size(world, this.#word), 'size')
    this.size = this.#word[0]
    const started = Number(process.env['OMPI_COMM_WORLD_SIZE'] ?? process.env['PMI_SIZE'] ?? this.size)
    if (this.size === 1 && started > 1) {
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'mpi',
        problem: `the launcher has started ${started} processes, and ${mpi.path} (${mpi.version}) knows of this one alone`,
        fix: 'start with the launcher of that library, or name the library of this launcher in MOE_MPI_LIBRARY',
      })
    }
  }

  async send(bytes: Uint8Array, to: number, lane: number): Promise<void> {
    await Promise.all(pieces(bytes).map(piece => this.#send(piece, to, lane)))
  }

  async receive(bytes: Uint8Array, from: number, lane: number): Promise<void> {
    await Promise.all(pieces(bytes).map(piece => this.#receive(piece, from, lane)))
  }

  async close(): Promise<void> {
    if (this.#closed) return
    if (this.#watching) {
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'mpi close',
        problem: 'messages are under way',
        fix: 'await all calls first; after a failure end the process instead, and the launcher ends the others',
      })
    }
    this.#closed = true
    this.#mpi.check(this.#mpi.call.finalize(), 'finalize')
  }

  #send(bytes: Uint8Array, to: number, lane: number): Promise<void> {
    this.#checkOpen('send')
    const { call, world, byte, address, check } = this.#mpi
    const request = new BigUint64Array(1)
    check(call.send(address(bytes), bytes.length, byte, to, lane, world, request), 'send')
    return new Promise((done, fail) => {
      this.#pending.add({ bytes, op: 'send', request, done, fail })
      this.#watch()
    })
  }

  #receive(bytes: Uint8Array, from: number, lane: number): Promise<void> {
    this.#checkOpen('receive')
    return new Promise((done, fail) => {
      const way = this.#ways.find(other => other.from === from && other.lane === lane)
      const wanted = { bytes, done, fail }
      if (way === undefined) this.#ways.push({ from, lane, wanted: [wanted] })
      else way.wanted.push(wanted)
      this.#watch()
    })
  }

  #checkOpen(op: string): void {
    if (!this.#closed) return
    throw new MoeError({
      code: 'E_DISPOSED',
      op: `mpi ${op}`,
      problem: 'the communicator is closed',
      fix: 'close it last',
    })
  }

  /** Asks MPI at every turn of the event loop until nothing is under way. */
  #watch(): void {
    if (this.#watching) return
    this.#watching = true
    setImmediate(this.#poll)
  }

  #poll = (): void => {
    for (const way of this.#ways) while (way.wanted.length > 0 && this.#begin(way)) way.wanted.shift()
    for (const pending of this.#pending) {
      try {
        if (!this.#isDone(pending)) continue
        pending.done()
      } catch (error) {
        pending.fail(error)
      }
      this.#pending.delete(pending)
    }
    this.#watching = this.#pending.size > 0 || this.#ways.some(({ wanted }) => wanted.length > 0)
    if (this.#watching) setImmediate(this.#poll)
  }

  /**
   * Begins to receive the next message of a way if it is there. Its length is looked at first: Open MPI may write what is too long behind the memory that it is given.
   * @returns whether the one that wants it need not wait any more
   */
  #begin({ from, lane, wanted: [{ bytes, done, fail }] }: Way): boolean {
    const { call, world, byte, address, check } = this.#mpi
    try {
      const message = new BigUint64Array(1)
      check(call.probe(from, lane, world, this.#word, message, this.#status), 'receive')
      if (this.#word[0] === 0) return false
      check(call.count(this.#status, byte, this.#word), 'receive')
      if (this.#word[0] !== bytes.length) throw wrongLength(this.#word[0], bytes.length, from)
      const request = new BigUint64Array(1)
      check(call.receive(address(bytes), bytes.length, byte, message, request), 'receive')
      this.#pending.add({ bytes, op: 'receive', request, done, fail })
    } catch (error) {
      fail(error)
    }
    return true
  }

  #isDone({ request, op }: Pending): boolean {
    const { call, check } = this.#mpi
    check(call.test(request, this.#word, this.#status), op)
    return this.#word[0] !== 0
  }
}

function pieces(bytes: Uint8Array): Uint8Array[] {
  if (bytes.length <= largestMessage) return [bytes]
  const count = Math.ceil(bytes.length / largestMessage)
  return Array.from({ length: count }, (_, i) => bytes.subarray(i * largestMessage, (i + 1) * largestMessage))
}
