/** @file A communicator of host memory, from messages between two ranks. */
import { type DType, fromHost, type HostArray, hostArray, MoeError, sizeOf, type Tensor } from '@moe/core'
import type { Communicator, Reduction, RowExchange, TensorLike } from './communicator.ts'
import { GroupTransport } from './group-transport.ts'
import { checkReduction, reduce } from './reduce.ts'
import type { Transport } from './transport.ts'

/** Keeps the messages of `send` apart from those of the calls that all ranks make. */
const lanes = { single: 0, all: 1 } as const

/** Tensors travel together up to so many elements: 16 MiB of f32. */
const bucketElements = 1 << 22

/** Downloads what is to be sent and uploads what came. */
export class HostCommunicator implements Communicator {
  readonly rank: number
  readonly size: number
  readonly #transport: Transport
  /** The latest call that all ranks make. The next one begins after it: messages have no other mark than their order. */
  #turn: Promise<unknown> = Promise.resolve()
  /** The latest `send`: the next one leaves after it. */
  #left: Promise<unknown> = Promise.resolve()
  /** Calls of `group`, as many on every rank: they tell whose lanes are whose. */
  #grouped = 0

  constructor(transport: Transport) {
    this.rank = transport.rank
    this.size = transport.size
    this.#transport = transport
  }

  async allReduce(tensors: readonly Tensor[], reduction: Reduction = 'sum'): Promise<Tensor[]> {
    for (const { dtype } of tensors) checkReduction('allReduce', dtype, reduction)
    return this.#makeInTurn(async results => {
      for (const bucket of bucketsOf(tensors)) {
        const { dtype } = bucket[0]
        const flat = joined(dtype, await Promise.all(bucket.map(tensor => tensor.data())))
        const share = shares(flat, this.#evenStarts(flat.length))
        const own = await this.#reduceShare(dtype, share, reduction)
        share(this.rank).set(own)
        await this.#exchange(() => own, share)
        let at = 0
        for (const { shape, size, backend } of bucket) {
          results.push(fromHost(flat.subarray(at, at + size), shape, dtype, backend))
          at += size
        }
      }
    })
  }

  async reduceScatter(tensor: Tensor, reduction: Reduction = 'sum'): Promise<Tensor> {
    const { dtype, shape, backend } = tensor
    checkReduction('reduceScatter', dtype, reduction)
    if (shape.length === 0 || shape[0] % this.size !== 0) {
      throw new MoeError({
        code: 'E_SHAPE',
        op: 'reduceScatter',
        problem: `[${shape}] cannot be shared by ${this.size} ranks along its first axis`,
        fix: 'pad it to a multiple of the ranks',
      })
    }
    return this.#inTurn(async () => {
      const data = await tensor.data()
      const own = await this.#reduceShare(dtype, shares(data, this.#evenStarts(data.length)), reduction)
      return fromHost(own, [shape[0] / this.size, ...shape.slice(1)], dtype, backend)
    })
  }

  async allGather(tensor: Tensor): Promise<Tensor> {
    const { dtype, shape, size, backend } = tensor
    return this.#inTurn(async () => {
      const own = await tensor.data()
      const all = hostArray(dtype, size * this.size)
      const place = shares(all, this.#evenStarts(all.length))
      place(this.rank).set(own)
      await this.#exchange(() => own, place)
      return fromHost(all, [(shape[0] ?? 1) * this.size, ...shape.slice(1)], dtype, backend)
    })
  }

  async allToAll(rows: Tensor, counts: readonly number[], coming?: readonly number[]): Promise<RowExchange> {
    const { dtype, shape, backend } = rows
    const fits = (numbers: readonly number[]) =>
      numbers.length === this.size && numbers.every(count => Number.isSafeInteger(count) && count >= 0)
    if (coming !== undefined && (!fits(coming) || coming[this.rank] !== counts[this.rank])) {
      throw new MoeError({
        code: 'E_SHAPE',
        op: 'allToAll',
        problem: `there cannot come [${coming}] rows to rank ${this.rank} of ${this.size}, which sends [${counts}]`,
        fix: 'give a count for each rank, that of this rank itself in both',
      })
    }
    if (shape.length === 0 || !fits(counts) || total(counts) !== shape[0]) {
      throw new MoeError({
        code: 'E_SHAPE',
        op: 'allToAll',
        problem: `counts [${counts}] do not deal the rows of [${shape}] out to ${this.size} ranks`,
        fix: 'give a count for each rank; their sum is the number of rows',
      })
    }
    return this.#inTurn(async () => {
      const give = Int32Array.from(counts)
      const take = Int32Array.from(coming ?? counts)
      const one = (array: Int32Array) => (rank: number) => array.subarray(rank, rank + 1)
      if (coming === undefined) await this.#exchange(one(give), one(take))
      const width = sizeOf(shape.slice(1))
      const from = shares(await rows.data(), startsOf(give, width))
      const received = hostArray(dtype, total(take) * width)
      const to = shares(received, startsOf(take, width))
      to(this.rank).set(from(this.rank))
      await this.#exchange(from, to)
      return { rows: fromHost(received, [total(take), ...shape.slice(1)], dtype, backend), counts: [...take] }
    })
  }

  async broadcast(tensors: readonly Tensor[], root = 0): Promise<Tensor[]> {
    this.#checkRank('broadcast', root)
    return this.#makeInTurn(async results => {
      for (const tensor of tensors) {
        const { dtype, shape, size, backend } = tensor
        const data = this.rank === root ? await tensor.data() : hostArray(dtype, size)
        await this.#passOn(data, root)
        results.push(fromHost(data, shape, dtype, backend))
      }
    })
  }

  async send(tensor: Tensor, to: number): Promise<void> {
    this.#checkRank('send', to, this.rank)
    const left = this.#left.then(async () => {
      const data = await tensor.data()
      return { done: this.#give(data, to, lanes.single) }
    })
    this.#left = left.catch(() => undefined)
    await (await left).done
  }

  async receive(like: TensorLike, from: number): Promise<Tensor> {
    this.#checkRank('receive', from, this.rank)
    const { shape, dtype, backend } = like
    const data = hostArray(dtype, sizeOf(shape))
    await this.#take(data, from, lanes.single)
    return fromHost(data, shape, dtype, backend)
  }

  group(members: readonly number[]): Communicator {
    this.#checkMembers(members)
    const firstLane = ++this.#grouped * Object.keys(lanes).length
    return new HostCommunicator(new GroupTransport(this.#transport, [...members], firstLane))
  }

  async barrier(): Promise<void> {
    return this.#inTurn(async () => {
      // After each round a rank knows that twice as many have come.
      for (let distance = 1; distance < this.size; distance *= 2) {
        const [above, below] = [this.rank + distance, this.rank - distance + this.size]
        await Promise.all([
          this.#give(new Uint8Array(1), above % this.size, lanes.all),
          this.#take(new Uint8Array(1), below % this.size, lanes.all),
        ])
      }
    })
  }

  async close(): Promise<void> {
    await Promise.all([this.#turn, this.#left])
    await this.#transport.close()
  }

  #inTurn<T>(call: () => Promise<T>): Promise<T> {
    const done = this.#turn.then(call)
    this.#turn = done.catch(() => undefined)
    return done
  }

  /** A call that makes several tensors, and leaves none behind when it fails. */
  #makeInTurn(call: (results: Tensor[]) => Promise<void>): Promise<Tensor[]> {
    return this.#inTurn(async () => {
      const results: Tensor[] = []
      try {
        await call(results)
      } catch (error) {
        for (const tensor of results) tensor.dispose()
        throw error
      }
      return results
    })
  }

  /** This rank's share, reduced over all ranks. */
  async #reduceShare(dtype: DType, share: (rank: number) => HostArray, reduction: Reduction): Promise<HostArray> {
    const own = share(this.rank)
    const parts = Array.from({ length: this.size }, (_, rank) =>
      rank === this.rank ? own : hostArray(dtype, own.length),
    )
    await this.#exchange(share, rank => parts[rank])
    return reduce(dtype, parts, reduction)
  }

  /** Gives every other rank an array, and fills one from each. */
  async #exchange(give: (rank: number) => HostArray, take: (rank: number) => HostArray): Promise<void> {
    const messages: Array<Promise<void>> = []
    for (let distance = 1; distance < this.size; distance++) {
      // Everyone begins with another rank.
      const to = (this.rank + distance) % this.size
      const from = (this.rank - distance + this.size) % this.size
      messages.push(this.#take(take(from), from, lanes.all), this.#give(give(to), to, lanes.all))
    }
    await Promise.all(messages)
  }

  /** `data` of rank `root` to all, along a binomial tree. */
  async #passOn(data: HostArray, root: number): Promise<void> {
    const place = (this.rank - root + this.size) % this.size
    const rankAt = (at: number) => (at + root) % this.size
    let reach = 1
    while (reach < this.size && (place & reach) === 0) reach *= 2
    if (place !== 0) await this.#take(data, rankAt(place - reach), lanes.all)
    for (reach /= 2; reach >= 1; reach /= 2) {
      if (place + reach < this.size) await this.#give(data, rankAt(place + reach), lanes.all)
    }
  }

  #give(data: HostArray, to: number, lane: number): Promise<void> {
    return data.length === 0 ? Promise.resolve() : this.#transport.send(bytesOf(data), to, lane)
  }

  #take(data: HostArray, from: number, lane: number): Promise<void> {
    return data.length === 0 ? Promise.resolve() : this.#transport.receive(bytesOf(data), from, lane)
  }

  #evenStarts(length: number): number[] {
    return Array.from({ length: this.size + 1 }, (_, rank) => Math.floor((rank * length) / this.size))
  }

  #checkMembers(members: readonly number[]): void {
    const refuse = (problem: string, fix: string) => new MoeError({ code: 'E_CONFIG', op: 'group', problem, fix })
    if (this.#transport instanceof GroupTransport)
      throw refuse('this is a group already', 'make groups of the ranks that it is of')
    for (const member of members) this.#checkRank('group', member)
    if (new Set(members).size === members.length && members.includes(this.rank)) return
    throw refuse(`[${members}] is no group of rank ${this.rank}`, 'name it once, and every other member once')
  }

  #checkRank(op: string, rank: number, not?: number): void {
    if (Number.isInteger(rank) && rank >= 0 && rank < this.size && rank !== not) return
    throw new MoeError({
      code: 'E_CONFIG',
      op,
      problem: rank === not ? `rank ${rank} is this rank itself` : `there is no rank ${rank} of ${this.size}`,
      fix: 'ranks count from 0',
    })
  }
}

const total = (counts: Iterable<number>) => [...counts].reduce((sum, count) => sum + count, 0)

/** First element of each rank's rows, and the end. */
function startsOf(counts: Int32Array, width: number): number[] {
  const starts = [0]
  for (const count of counts) starts.push((starts.at(-1) as number) + count * width)
  return starts
}

/** The part of each rank. */
const shares = (data: HostArray, starts: readonly number[]) => (rank: number) =>
  data.subarray(starts[rank], starts[rank + 1])

const bytesOf = ({ buffer, byteOffset, byteLength }: HostArray) => new Uint8Array(buffer, byteOffset, byteLength)

function bucketsOf(tensors: readonly Tensor[]): Tensor[][] {
  const buckets: Tensor[][] = []
  let room = 0
  for (const tensor of tensors) {
    room -= tensor.size
    const last = buckets.at(-1)
    if (last !== undefined && last[0].dtype === tensor.dtype && room >= 0) last.push(tensor)
    else {
      buckets.push([tensor])
      room = bucketElements - tensor.size
    }
  }
  return buckets
}

function joined(dtype: DType, arrays: readonly HostArray[]): HostArray {
  if (arrays.length === 1) return arrays[0]
  const flat = hostArray(dtype, total(arrays.map(({ length }) => length)))
  let at = 0
  for (const array of arrays) {
    flat.set(array, at)
    at += array.length
  }
  return flat
}
