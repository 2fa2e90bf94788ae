/** @file Ranks as processes started by an MPI launcher (mpirun, mpiexec), with messages through the MPI library. */
import { checkOptions, MoeError } from '@moe/core'
import type { Communicator } from '../communicator/communicator.ts'
import { overHost } from '../communicator/host-carrier.ts'
import { type Transport, wrongLength } from '../communicator/transport.ts'
import { type MpiLibrary, openMpi } from './library.ts'

/** MPI counts in 32-bit integers. */
const largestMessage = 1 << 30

/** Milliseconds without messages after which a rank that waits for one polls less often. */
const busyTime = 1000

/** MPI can be initialized only once per process. */
let opened: Promise<Communicator> | undefined

/**
 * Connects the processes that `mpirun` or `mpiexec` has started; this process is one of the ranks. Every call in a process returns the same communicator. Without a launcher, this process is
 * the only rank.
 *
 * Messages do not block the event loop. A rank that waits polls MPI on every turn of the event loop, which keeps a core busy, as usual for MPI programs. After a second
 * without messages, it polls a thousand times per second.
 *
 * Call `close()` (MPI_Finalize) at the end, but not after a failure: launchers end the other ranks when a process exits without it.
 * @param options.library path of the MPI library. Default: MOE_MPI_LIBRARY, or the installed library of the launcher
 * @throws MoeError E_NO_BACKEND if there is no MPI library, E_CONFIG if it does not find the other processes of the launcher
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

/** A message in progress. */
interface Pending {
  /** Memory that MPI reads or writes until the message is complete. */
  readonly bytes: Uint8Array
  readonly op: 'send' | 'receive'
  readonly request: BigUint64Array
  readonly done: () => void
  readonly fail: (error: unknown) => void
}

/** A receive whose message has not arrived. */
type Receive = Omit<Pending, 'op' | 'request'>

/** The receives from one rank on one lane, which complete in order. */
interface Channel {
  readonly from: number
  readonly lane: number
  readonly receives: Receive[]
}

class MpiTransport implements Transport {
  readonly rank: number
  readonly size: number
  readonly #mpi: MpiLibrary
  readonly #pending = new Set<Pending>()
  readonly #channels: Channel[] = []
  #polling = false
  /** When the latest message was started or completed. */
  #active = 0
  readonly #word = new Int32Array(1)
  /** An MPI_Status: 20 bytes in MPICH, 24 in Open MPI. */
  readonly #status = new Uint8Array(256)
  #closed = false

  constructor(mpi: MpiLibrary) {
    this.#mpi = mpi
    const { call, world } = mpi
    // MPI_THREAD_FUNNELED: Node has several threads, but all calls are made on this one.
    mpi.check(call.initThread(null, null, 1, this.#word), 'init')
    mpi.check(call.setErrorHandler(world, mpi.errorsReturn), 'init')
    mpi.check(call.rank(world, this.#word), 'rank')
    this.rank = this.#word[0]
    mpi.check(call.size(world, this.#word), 'size')
    this.size = this.#word[0]
    const { launcher, processes, fix } = startedBy(process.env)
    if (this.size === 1 && processes > 1) {
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'mpi',
        problem: `${launcher} started ${processes} processes, but ${mpi.path} (${mpi.version}) finds only this one`,
        fix,
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
    if (this.#polling) {
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'mpi close',
        problem: 'messages are still in progress',
        fix: 'await all calls first; after a failure, exit the process instead, and the launcher ends the others',
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
      this.#startPolling()
    })
  }

  #receive(bytes: Uint8Array, from: number, lane: number): Promise<void> {
    this.#checkOpen('receive')
    return new Promise((done, fail) => {
      const channel = this.#channels.find(other => other.from === from && other.lane === lane)
      const receive = { bytes, done, fail }
      if (channel === undefined) this.#channels.push({ from, lane, receives: [receive] })
      else channel.receives.push(receive)
      this.#startPolling()
    })
  }

  #checkOpen(op: string): void {
    if (!this.#closed) return
    throw new MoeError({
      code: 'E_DISPOSED',
      op: `mpi ${op}`,
      problem: 'the communicator is closed',
      fix: 'close it after the last call',
    })
  }

  /** Polls MPI until all messages are complete. */
  #startPolling(): void {
    this.#active = performance.now()
    if (this.#polling) return
    this.#polling = true
    setImmediate(this.#poll)
  }

  #poll = (): void => {
    for (const channel of this.#channels)
      while (channel.receives.length > 0 && this.#tryReceive(channel)) channel.receives.shift()
    for (const pending of this.#pending) {
      try {
        if (!this.#isDone(pending)) continue
        this.#active = performance.now()
        pending.done()
      } catch (error) {
        pending.fail(error)
      }
      this.#pending.delete(pending)
    }
    this.#polling = this.#pending.size > 0 || this.#channels.some(({ receives }) => receives.length > 0)
    if (!this.#polling) return
    // MPI moves long messages piece by piece, and only when it is called.
    if (this.#pending.size > 0 || performance.now() - this.#active < busyTime) setImmediate(this.#poll)
    else setTimeout(this.#poll, 1)
  }

  /**
   * Starts the first receive of a channel if its message has arrived. Checks the length before: Open MPI may write a longer message past the end of the buffer.
   * @returns whether the receive has been started, or has failed
   */
  #tryReceive({ from, lane, receives: [{ bytes, done, fail }] }: Channel): boolean {
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

/** What this process was started by, with how many processes, and what to do if the library does not find the others. */
function startedBy(environment: NodeJS.ProcessEnv) {
  const size = environment['OMPI_COMM_WORLD_SIZE'] ?? environment['PMI_SIZE']
  const tasks = environment['SLURM_STEP_NUM_TASKS']
  if (size === undefined && tasks !== undefined) {
    const fix =
      'pass srun an --mpi that the library supports, such as pmix for Open MPI or pmi2 for MPICH (srun --mpi=list shows all), or use mpirun'
    return { launcher: 'srun', processes: Number(tasks), fix }
  }
  const fix = "use the launcher of that library, or set MOE_MPI_LIBRARY to the path of this launcher's library"
  return { launcher: 'the launcher', processes: Number(size ?? 1), fix }
}

function pieces(bytes: Uint8Array): Uint8Array[] {
  if (bytes.length <= largestMessage) return [bytes]
  const count = Math.ceil(bytes.length / largestMessage)
  return Array.from({ length: count }, (_, i) => bytes.subarray(i * largestMessage, (i + 1) * largestMessage))
}
