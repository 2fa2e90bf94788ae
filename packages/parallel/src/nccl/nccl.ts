/** @file A communicator that sends tensors from device to device with NCCL. */
import { type Backend, checkOptions, defaultBackend, MoeError } from '@moe/core'
import type { Carrier, Message } from '../communicator/carrier.ts'
import type { Communicator } from '../communicator/communicator.ts'
import { HostCarrier } from '../communicator/host-carrier.ts'
import { MessageCommunicator } from '../communicator/message-communicator.ts'
import { Connection, type Place } from './connection.ts'
import { type CudaAccess, type DeviceElements, DeviceMemory } from './device-memory.ts'
import { type NcclLibrary, numbers, openNccl } from './library.ts'

/**
 * Connects the same ranks with NVIDIA's NCCL: tensors are sent from GPU to GPU, by NVLink or the network, while the backend continues to compute. Results have the same bits as
 * those of `ranks`. Row counts, barriers and the setup of connections go over `ranks`, which `close()` also closes.
 *
 * All ranks call it, each with its own GPU: `createBackend({ device })` of `@moe/kernels-cuda`. Needs NCCL 2.18 or later.
 * @param ranks the result of `mpi()`, or the communicator of `local`
 * @param options.backend the backend of all tensors, from `@moe/kernels-cuda`. Default: the default backend
 * @param options.library path of libnccl. Default: MOE_NCCL_LIBRARY, or the installed library
 * @throws MoeError E_NO_BACKEND if there is no NCCL library, E_CONFIG for another kind of backend or communicator, E_BACKEND if the ranks cannot be connected (for example two ranks on one
 * device, or no network)
 */
export async function nccl(
  ranks: Communicator,
  options: { readonly backend?: Backend; readonly library?: string } = {},
): Promise<Communicator> {
  checkOptions('nccl', options, { backend: true, library: true })
  const { backend = defaultBackend(), library } = options
  const access = (backend as { readonly interop?: CudaAccess }).interop
  if (access === undefined) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'nccl',
      problem: `${backend.name} is not a CUDA backend`,
      fix: 'pass a backend created by createBackend of @moe/kernels-cuda, or use the ranks without nccl()',
    })
  }
  const carrier = ranks instanceof MessageCommunicator ? ranks.carrier : undefined
  if (!(carrier instanceof HostCarrier)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'nccl',
      problem: 'ranks is not a communicator of mpi() or local()',
      fix: 'call nccl(await mpi())',
    })
  }
  const all = Array.from({ length: ranks.size }, (_, rank) => rank)
  const device = new NcclCarrier({ nccl: await openNccl(library), access, ranks: carrier, connections: [] }, all)
  await device.connect()
  return new MessageCommunicator(device, new DeviceMemory(access))
}

/** State shared by the carriers of all ranks and of groups. */
interface Common {
  readonly nccl: NcclLibrary
  readonly access: CudaAccess
  /** All ranks, for messages through host memory. */
  readonly ranks: HostCarrier
  /** All connections, to be closed. */
  readonly connections: Array<Promise<Connection>>
}

class NcclCarrier implements Carrier<DeviceElements> {
  readonly rank: number
  readonly size: number
  readonly #common: Common
  /** The same ranks as a group of their own, for messages through host memory. */
  readonly #host: HostCarrier
  #all: Promise<Connection> | undefined
  /** Point-to-point connections, one for each peer and direction, so that a waiting message blocks no other. */
  readonly #pairs = new Map<string, Promise<Connection>>()

  constructor(common: Common, members: readonly number[]) {
    this.#common = common
    this.#host = common.ranks.group(members)
    this.rank = this.#host.rank
    this.size = this.#host.size
  }

  /** Connects all ranks. */
  connect(): Promise<Connection> {
    this.#all ??= this.#keep(this.#connectAll())
    return this.#all
  }

  async exchange(messages: ReadonlyArray<Message<DeviceElements>>): Promise<void> {
    // Connect even without messages, because all ranks must take part.
    const connection = await this.connect()
    await connection.carry(messages.filter(({ elements }) => elements.length > 0))
  }

  numbers(give: Int32Array): Promise<Int32Array> {
    return this.#host.numbers(give)
  }

  barrier(): Promise<void> {
    return this.#host.barrier()
  }

  async send(elements: DeviceElements, to: number): Promise<void> {
    if (elements.length === 0) return
    // The sender is rank 0 of the pair.
    const connection = await this.#pair(`to ${to}`, async () => {
      const id = this.#newId()
      await this.#host.send(id, to)
      return { ranks: 2, rank: 0, id }
    })
    await connection.carry([{ to: 1, elements }])
  }

  async receive(elements: DeviceElements, from: number): Promise<void> {
    if (elements.length === 0) return
    const connection = await this.#pair(`from ${from}`, async () => {
      const id = new Uint8Array(numbers.uniqueIdBytes)
      await this.#host.receive(id, from)
      return { ranks: 2, rank: 1, id }
    })
    await connection.carry([{ from: 0, elements }])
  }

  group(members: readonly number[]): NcclCarrier {
    return new NcclCarrier(this.#common, members)
  }

  async close(): Promise<void> {
    const { connections, ranks } = this.#common
    await Promise.all((await Promise.all(connections)).map(connection => connection.close()))
    await ranks.close()
  }

  async #connectAll(): Promise<Connection> {
    const id = this.rank === 0 ? this.#newId() : new Uint8Array(numbers.uniqueIdBytes)
    const others = Array.from({ length: this.size - 1 }, (_, i) => i + 1)
    await this.#host.exchange(this.rank === 0 ? others.map(to => ({ to, elements: id })) : [{ from: 0, elements: id }])
    return this.#open({ ranks: this.size, rank: this.rank, id })
  }

  #pair(name: string, exchangeId: () => Promise<Place>): Promise<Connection> {
    let pair = this.#pairs.get(name)
    if (pair === undefined) {
      pair = this.#keep(exchangeId().then(place => this.#open(place)))
      this.#pairs.set(name, pair)
    }
    return pair
  }

  #open(place: Place): Promise<Connection> {
    return Connection.open(this.#common.nccl, this.#common.access, place)
  }

  #keep(connection: Promise<Connection>): Promise<Connection> {
    this.#common.connections.push(connection)
    return connection
  }

  #newId(): Uint8Array {
    const id = new Uint8Array(numbers.uniqueIdBytes)
    const { nccl, access } = this.#common
    access.makeCurrent()
    nccl.check(nccl.call.ncclGetUniqueId(id), 'begin')
    return id
  }
}
