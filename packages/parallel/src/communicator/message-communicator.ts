/** @file A communicator built on messages between pairs of ranks, independent of the memory that holds the elements. */
import { type DType, MoeError, sizeOf, type Tensor } from '@moe/core'
import type { Carrier, Memory, Message, Workspace } from './carrier.ts'
import type { Communicator, Reduction, RowExchange, TensorEach, TensorLike } from './communicator.ts'
import { checkReduction } from './reduce.ts'
import {
  Assembly,
  checkOwn,
  checkShards,
  elementsOf,
  lengthOf,
  type Part,
  partsInBuckets,
  type Shards,
  Sources,
  shapeOf,
  type Target,
  wholeTensors,
} from './row-shards.ts'

/** The largest number of elements that are sent together: 16 MiB of f32. */
const bucketElements = 1 << 22

/** The elements for, or from, each rank. */
type Shard<E> = (rank: number) => E

/** How shards are exchanged, bucket by bucket. */
interface ShardExchange<E> {
  readonly dtype: DType
  /** The rows that fill each rank's section of a bucket before the exchange; empty for sections that are not filled. */
  readonly inputs: Shards
  /** Exchanges a bucket, filling the sections that are read. */
  readonly exchange: (space: Workspace<E>, section: Shard<E>, bucket: ReadonlyArray<readonly Part[]>) => Promise<void>
  /** Where each rank's section goes after the exchange, from element `at` on; empty for sections that are not read. */
  readonly outputs: ReadonlyArray<ReadonlyArray<{ readonly target: Target<E>; readonly at: number }>>
}

/**
 * Implements collectives with pairwise messages. An all-reduce is a reduce-scatter, with each rank adding its section in the order of ranks, followed by an
 * all-gather. `E` is a contiguous run of elements on the host or on a device.
 */
export class MessageCommunicator<E> implements Communicator {
  readonly rank: number
  readonly size: number
  readonly carrier: Carrier<E>
  readonly #memory: Memory<E>
  readonly #isGroup: boolean
  /** The latest collective call. The next one starts after it, because messages are identified by their order only. */
  #lastCall: Promise<unknown> = Promise.resolve()
  /** The latest `send`. The next one starts after its message is queued. */
  #lastSend: Promise<unknown> = Promise.resolve()

  constructor(carrier: Carrier<E>, memory: Memory<E>, isGroup = false) {
    this.rank = carrier.rank
    this.size = carrier.size
    this.carrier = carrier
    this.#memory = memory
    this.#isGroup = isGroup
  }

  async allReduce<const T extends readonly Tensor[]>(tensors: T, reduction: Reduction = 'sum'): Promise<TensorEach<T>> {
    for (const { dtype } of tensors) checkReduction('allReduce', dtype, reduction)
    const sums = await this.#makeInTurn((_, results) =>
      this.#reduceAll(tensors, reduction, (space, elements, like) => results.push(space.tensor(elements, like))),
    )
    return sums as TensorEach<T>
  }

  async allReduceInPlace(tensors: readonly Tensor[], reduction: Reduction = 'sum'): Promise<void> {
    for (const { dtype } of tensors) checkReduction('allReduceInPlace', dtype, reduction)
    return this.#inTurn(() =>
      this.#reduceAll(tensors, reduction, (space, elements, tensor) => space.write(tensor, elements)),
    )
  }

  async reduceScatter(tensor: Tensor, reduction: Reduction = 'sum'): Promise<Tensor> {
    const { dtype, shape, size, backend } = tensor
    checkReduction('reduceScatter', dtype, reduction)
    if (shape.length === 0 || shape[0] % this.size !== 0) {
      throw new MoeError({
        code: 'E_SHAPE',
        op: 'reduceScatter',
        problem: `the first axis of [${shape}] is not divisible by the number of ranks, ${this.size}`,
        fix: 'pad the tensor to a multiple of the number of ranks',
      })
    }
    return this.#inTurn(async space => {
      const shard = placesOf(space, await this.#memory.of(tensor), evenStarts(size, this.size))
      const own = space.make(dtype, size / this.size)
      await this.#reduceShard(space, own, size / this.size, shard, { dtype, reduction })
      return space.tensor(own, { shape: [shape[0] / this.size, ...shape.slice(1)], dtype, backend })
    })
  }

  async reduceScatterRows(shards: Shards, into?: readonly Tensor[]): Promise<readonly Tensor[]> {
    const dtype = checkShards('reduceScatterRows', shards, this.size)
    const mine = shards[this.rank]
    if (into !== undefined) checkOwn('reduceScatterRows', mine, into)
    if (dtype === null) return []
    const made = await this.#makeInTurn((_, results) => {
      const own = mine.map((rows, i) => {
        const finish = (space: Workspace<E>, elements: E) => {
          if (into !== undefined) space.write(into[i], elements)
          else results.push(space.tensor(elements, { shape: shapeOf(rows), dtype, backend: rows.tensor.backend }))
        }
        return { target: { length: lengthOf([elementsOf(rows)]), finish }, at: 0 }
      })
      return this.#bucketByBucket(shards, {
        dtype,
        inputs: shards,
        exchange: (space, section, bucket) => {
          const length = lengthOf(bucket[this.rank])
          return this.#reduceShard(space, section(this.rank), length, section, { dtype, reduction: 'sum' })
        },
        outputs: shards.map((_, rank) => (rank === this.rank ? own : [])),
      })
    })
    return into ?? made
  }

  async allGatherRows(shards: Shards, own: readonly Tensor[]): Promise<void> {
    const dtype = checkShards('allGatherRows', shards, this.size)
    checkOwn('allGatherRows', shards[this.rank], own)
    const tensors = wholeTensors('allGatherRows', shards)
    if (dtype === null) return
    const targetOf = (tensor: Tensor): [Tensor, Target<E>] => {
      // A tensor that is in `own` belongs to this rank alone and already has its value.
      const finish = (space: Workspace<E>, elements: E) => own.includes(tensor) || space.write(tensor, elements)
      return [tensor, { length: tensor.size, finish }]
    }
    const targets = new Map(tensors.map(targetOf))
    const given = own.map(tensor => ({ tensor, from: 0, to: tensor.shape[0] ?? 1 }))
    return this.#inTurn(() =>
      this.#bucketByBucket(shards, {
        dtype,
        inputs: shards.map((_, rank) => (rank === this.rank ? given : [])),
        exchange: (_, section) => this.#exchange(() => section(this.rank), section),
        outputs: shards.map(shard =>
          shard.map(rows => ({ target: targets.get(rows.tensor) as Target<E>, at: elementsOf(rows).from })),
        ),
      }),
    )
  }

  async allGather(tensor: Tensor): Promise<Tensor> {
    const { dtype, shape, size, backend } = tensor
    return this.#inTurn(async space => {
      const own = await this.#memory.of(tensor)
      const all = space.make(dtype, size * this.size)
      const place = placesOf(space, all, evenStarts(size * this.size, this.size))
      space.copy(place(this.rank), own)
      await this.#exchange(() => own, place)
      return space.tensor(all, { shape: [(shape[0] ?? 1) * this.size, ...shape.slice(1)], dtype, backend })
    })
  }

  async allToAll(rows: Tensor, counts: readonly number[], incoming?: readonly number[]): Promise<RowExchange> {
    const { dtype, shape, backend } = rows
    const fits = (numbers: readonly number[]) =>
      numbers.length === this.size && numbers.every(count => Number.isSafeInteger(count) && count >= 0)
    if (incoming !== undefined && (!fits(incoming) || incoming[this.rank] !== counts[this.rank])) {
      throw new MoeError({
        code: 'E_SHAPE',
        op: 'allToAll',
        problem: `rank ${this.rank} of ${this.size} cannot receive [${incoming}] rows while it sends [${counts}]`,
        fix: 'pass a count for each rank, with the same count for this rank itself in both lists',
      })
    }
    if (shape.length === 0 || !fits(counts) || total(counts) !== shape[0]) {
      throw new MoeError({
        code: 'E_SHAPE',
        op: 'allToAll',
        problem: `counts [${counts}] do not divide the rows of [${shape}] among ${this.size} ranks`,
        fix: 'pass a count for each rank, with the number of rows as their sum',
      })
    }
    return this.#inTurn(async space => {
      const take = incoming ?? [...(await this.carrier.numbers(Int32Array.from(counts)))]
      const width = sizeOf(shape.slice(1))
      const from = placesOf(space, await this.#memory.of(rows), startsOf(counts, width))
      const received = space.make(dtype, total(take) * width)
      const to = placesOf(space, received, startsOf(take, width))
      space.copy(to(this.rank), from(this.rank))
      await this.#exchange(from, to)
      return {
        rows: space.tensor(received, { shape: [total(take), ...shape.slice(1)], dtype, backend }),
        counts: [...take],
      }
    })
  }

  async broadcast<const T extends readonly Tensor[]>(tensors: T, root = 0): Promise<TensorEach<T>> {
    this.#checkRank('broadcast', root)
    const copies = await this.#makeInTurn(async (space, results) => {
      for (const tensor of tensors) {
        const elements = this.rank === root ? await this.#memory.of(tensor) : space.make(tensor.dtype, tensor.size)
        await this.#broadcast(elements, root)
        results.push(space.tensor(elements, tensor))
      }
    })
    return copies as TensorEach<T>
  }

  async send(tensor: Tensor, to: number): Promise<void> {
    this.#checkRank('send', to, this.rank)
    // Resolves when the message is queued: `done` is wrapped so that it is not awaited.
    const queued = this.#lastSend.then(async () => {
      const elements = await this.#memory.of(tensor)
      return { done: this.carrier.send(elements, to) }
    })
    this.#lastSend = queued.catch(() => undefined)
    await (await queued).done
  }

  async receive(like: TensorLike, from: number): Promise<Tensor> {
    this.#checkRank('receive', from, this.rank)
    return this.#withWorkspace(async space => {
      const elements = space.make(like.dtype, sizeOf(like.shape))
      await this.carrier.receive(elements, from)
      return space.tensor(elements, like)
    })
  }

  group(members: readonly number[]): Communicator {
    this.#checkMembers(members)
    return new MessageCommunicator(this.carrier.group([...members]), this.#memory, true)
  }

  async barrier(): Promise<void> {
    return this.#inTurn(() => this.carrier.barrier())
  }

  async close(): Promise<void> {
    await Promise.all([this.#lastCall, this.#lastSend])
    await this.carrier.close()
  }

  #inTurn<T>(call: (space: Workspace<E>) => Promise<T>): Promise<T> {
    const done = this.#lastCall.then(() => this.#withWorkspace(call))
    this.#lastCall = done.catch(() => undefined)
    return done
  }

  async #withWorkspace<T>(call: (space: Workspace<E>) => Promise<T>): Promise<T> {
    const space = this.#memory.open()
    let failed = true
    try {
      const result = await call(space)
      failed = false
      return result
    } finally {
      space.close(failed)
    }
  }

  /** Makes a call that returns several tensors, and disposes of them if it fails. */
  #makeInTurn(call: (space: Workspace<E>, results: Tensor[]) => Promise<void>): Promise<Tensor[]> {
    return this.#inTurn(async space => {
      const results: Tensor[] = []
      try {
        await call(space, results)
      } catch (error) {
        for (const tensor of results) tensor.dispose()
        throw error
      }
      return results
    })
  }

  async #bucketByBucket(shards: Shards, { dtype, inputs, exchange, outputs }: ShardExchange<E>): Promise<void> {
    const sources = new Sources(this.#memory, inputs.flat())
    const assembly = new Assembly(this.#memory, dtype)
    const exchangeBucket = (bucket: ReadonlyArray<readonly Part[]>) =>
      this.#withWorkspace(async space => {
        const starts = startsOf(bucket.map(lengthOf))
        const flat = space.make(dtype, starts[this.size])
        const placed = bucket.map((parts, rank) => {
          const within = startsOf(parts.map(part => lengthOf([part])))
          return parts.map((part, i) => ({
            ...part,
            place: space.part(flat, starts[rank] + within[i], starts[rank] + within[i + 1]),
          }))
        })
        for (const [rank, rows] of inputs.entries()) {
          if (rows.length === 0) continue
          for (const { index, from, to, place } of placed[rank])
            space.copy(place, await sources.take(space, rows[index], from, to))
        }
        await exchange(space, placesOf(space, flat, starts), bucket)
        for (const [rank, rows] of outputs.entries()) {
          if (rows.length === 0) continue
          for (const { index, from, to, place } of placed[rank]) {
            const { target, at } = rows[index]
            assembly.put(space, target, at + from, place, to - from)
          }
        }
      })
    try {
      for (const bucket of partsInBuckets(shards, Math.ceil(bucketElements / this.size))) await exchangeBucket(bucket)
    } finally {
      assembly.close()
    }
  }

  /** Reduces all tensors, and calls `finish` with the result of each. */
  async #reduceAll(
    tensors: readonly Tensor[],
    reduction: Reduction,
    finish: (space: Workspace<E>, elements: E, tensor: Tensor) => void,
  ): Promise<void> {
    const reduceBucket = (bucket: readonly Tensor[]) =>
      this.#withWorkspace(async space => {
        const { dtype } = bucket[0]
        const starts = startsOf(bucket.map(({ size }) => size))
        const flat = space.make(dtype, starts[bucket.length])
        const place = placesOf(space, flat, starts)
        const elements = await Promise.all(bucket.map(tensor => this.#memory.of(tensor)))
        for (const [i, from] of elements.entries()) space.copy(place(i), from)
        const even = evenStarts(starts[bucket.length], this.size)
        const shard = placesOf(space, flat, even)
        const own = shard(this.rank)
        await this.#reduceShard(space, own, even[this.rank + 1] - even[this.rank], shard, { dtype, reduction })
        await this.#exchange(() => own, shard)
        for (const [i, tensor] of bucket.entries()) finish(space, place(i), tensor)
      })
    for (const bucket of bucketsOf(tensors)) await reduceBucket(bucket)
  }

  /** Sets `to` to this rank's shard, `length` elements, reduced over all ranks. `to` may be `shard(this.rank)`. */
  async #reduceShard(
    space: Workspace<E>,
    to: E,
    length: number,
    shard: Shard<E>,
    { dtype, reduction }: { readonly dtype: DType; readonly reduction: Reduction },
  ): Promise<void> {
    const parts = Array.from({ length: this.size }, (_, rank) =>
      rank === this.rank ? shard(rank) : space.make(dtype, length),
    )
    await this.#exchange(shard, rank => parts[rank])
    space.reduce(to, parts, dtype, reduction)
  }

  /** Sends each other rank its elements, and receives elements from each. */
  async #exchange(give: Shard<E>, take: Shard<E>): Promise<void> {
    const messages: Array<Message<E>> = []
    for (let distance = 1; distance < this.size; distance++) {
      // Each rank starts with a different peer.
      const to = (this.rank + distance) % this.size
      const from = (this.rank - distance + this.size) % this.size
      messages.push({ from, elements: take(from) }, { to, elements: give(to) })
    }
    await this.carrier.exchange(messages)
  }

  /** Sends the elements of rank `root` to all ranks along a binomial tree. */
  async #broadcast(elements: E, root: number): Promise<void> {
    const place = (this.rank - root + this.size) % this.size
    const rankAt = (at: number) => (at + root) % this.size
    let reach = 1
    while (reach < this.size && (place & reach) === 0) reach *= 2
    if (place !== 0) await this.carrier.exchange([{ from: rankAt(place - reach), elements }])
    for (reach /= 2; reach >= 1; reach /= 2) {
      if (place + reach < this.size) await this.carrier.exchange([{ to: rankAt(place + reach), elements }])
    }
  }

  #checkMembers(members: readonly number[]): void {
    const error = (problem: string, fix: string) => new MoeError({ code: 'E_CONFIG', op: 'group', problem, fix })
    if (this.#isGroup)
      throw error('this communicator is already a group', 'call group() on the communicator of all ranks')
    for (const member of members) this.#checkRank('group', member)
    if (new Set(members).size === members.length && members.includes(this.rank)) return
    throw error(
      `[${members}] is not a valid group for rank ${this.rank}`,
      'list this rank and every other member exactly once',
    )
  }

  #checkRank(op: string, rank: number, not?: number): void {
    if (Number.isInteger(rank) && rank >= 0 && rank < this.size && rank !== not) return
    throw new MoeError({
      code: 'E_CONFIG',
      op,
      problem: rank === not ? `rank ${rank} is this rank itself` : `there is no rank ${rank} (size ${this.size})`,
      fix: `pass a rank from 0 to ${this.size - 1}${not === undefined ? '' : ', other than this one'}`,
    })
  }
}

const total = (counts: Iterable<number>) => [...counts].reduce((sum, count) => sum + count, 0)

/** The first element of each rank's rows, and the end. */
function startsOf(counts: readonly number[], width = 1): number[] {
  const starts = [0]
  for (const count of counts) starts.push((starts.at(-1) as number) + count * width)
  return starts
}

/** `startsOf` for sections of equal length, up to one element. */
const evenStarts = (length: number, ranks: number) =>
  Array.from({ length: ranks + 1 }, (_, rank) => Math.floor((rank * length) / ranks))

const placesOf =
  <E>(space: Workspace<E>, of: E, starts: readonly number[]): Shard<E> =>
  rank =>
    space.part(of, starts[rank], starts[rank + 1])

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
