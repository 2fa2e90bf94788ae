/** @file Ranks that exchange tensors from device to device, by NCCL. */
import { type Backend, checkOptions, defaultBackend, MoeError } from '@moe/core'
import type { Carrier, Message } from '../communicator/carrier.ts'
import type { Communicator } from '../communicator/communicator.ts'
import { HostCarrier } from '../communicator/host-carrier.ts'
import { MessageCommunicator } from '../communicator/message-communicator.ts'
import { Connection, type Place } from './connection.ts'
import { type CudaAccess, type DeviceElements, DeviceMemory } from './device-memory.ts'
import { type NcclLibrary, numbers, openNccl } from './library.ts'

/**
 * The same ranks over NVIDIA's NCCL: tensors go from device to device, by NVLink or the network, beside what the backend computes. All ranks call it, each with
 * a device of its own: `createBackend({ device })` of `@moe/kernels-cuda`. Sums have the bits of `ranks`' own. Counts, barriers and what ranks need to find each other go
 * over `ranks`, which is closed with it.
 * @param options.backend of `@moe/kernels-cuda`; default: the default backend. All tensors that are exchanged are of it.
 * @param options.library path of libnccl; default: MOE_NCCL_LIBRARY, or the installed one
 * @throws MoeError E_NO_BACKEND without NCCL, E_CONFIG for another backend, E_BACKEND when ranks cannot be connected (two on one device, no network)
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
      problem: `${backend.name} is no backend of NVIDIA devices`,
      fix: 'make one with createBackend of @moe/kernels-cuda, or use the ranks as they are',
    })
  }
  const carrier = ranks instanceof MessageCommunicator ? ranks.carrier : undefined
  if (!(carrier instanceof HostCarrier)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'nccl',
      problem: 'the ranks are none of mpi() or local()',
      fix: 'pass what one of these gives: nccl(await mpi())',
    })
  }
  const all = Array.from({ length: ranks.size }, (_, rank) => rank)
  const device = new NcclCarrier({ nccl: await openNccl(library), access, ranks: carrier, connections: [] }, all)
  await device.connect()
  return new MessageCommunicator(device, new DeviceMemory(access))
}

/** What the carrier of all ranks and those of groups share. */
interface Common {
  readonly nccl: NcclLibrary
  readonly access: CudaAccess
  /** All ranks, on hosts. */
  readonly ranks: HostCarrier
  /** All that were made. */
  readonly connections: Array<Promise<Connection>>
}

class NcclCarrier implements Carrier<DeviceElements> {
  readonly rank: number
  readonly size: number
  readonly #common: Common
  /** The same ranks on hosts, with messages apart from all others. */
  readonly #host: HostCarrier
  #all: Promise<Connection> | undefined
  /** From this rank to another, and from another to this one: a message that waits holds up no other. */
  readonly #ways = new Map<string, Promise<Connection>>()

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
    // Every rank comes here, also without a message.
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
    // Of two ranks the first one sends.
    const connection = await this.#way(`to ${to}`, async () => {
      const id = this.#newId()
      await this.#host.send(id, to)
      return { ranks: 2, rank: 0, id }
    })
    await connection.carry([{ to: 1, elements }])
  }

  async receive(elements: DeviceElements, from: number): Promise<void> {
    if (elements.length === 0) return
    const connection = await this.#way(`from ${from}`, async () => {
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

  #way(name: string, meet: () => Promise<Place>): Promise<Connection> {
    let way = this.#ways.get(name)
    if (way === undefined) {
      way = this.#keep(meet().then(place => this.#open(place)))
      this.#ways.set(name, way)
    }
    return way
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
    access.use()
    nccl.check(nccl.call.ncclGetUniqueId(id), 'begin')
    return id
  }
}
