/** @file A communicator made of messages between two ranks, whatever memory they come from. */
import { type DType, MoeError, sizeOf, type Tensor } from '@moe/core'
import type { Carrier, Memory, Message, Workspace } from './carrier.ts'
import type { Communicator, Reduction, RowExchange, TensorLike } from './communicator.ts'
import { checkReduction } from './reduce.ts'
import {
  Assembly,
  checkOwn,
  checkShares,
  elementsOf,
  lengthOf,
  type Part,
  partsInBuckets,
  type Shares,
  Sources,
  shapeOf,
  type Target,
  wholeTensors,
} from './shares.ts'

/** Tensors travel together up to so many elements: 16 MiB of f32. */
const bucketElements = 1 << 22

/** What a rank is given, or what comes from it. */
type Share<E> = (rank: number) => E

/** What comes of shares, bucket by bucket. */
interface ShareExchange<E> {
  readonly dtype: DType
  /** Where the rows of each rank are taken from; nothing for ranks whose place in a bucket is not filled. */
  readonly give: Shares
  /** Fills the places that are read. */
  readonly meet: (space: Workspace<E>, place: Share<E>, bucket: ReadonlyArray<readonly Part[]>) => Promise<void>
  /** What the rows of each rank are for, and from which element on; nothing for ranks whose place is not read. */
  readonly take: ReadonlyArray<ReadonlyArray<{ readonly target: Target<E>; readonly at: number }>>
}

/**
 * Sums are a reduce-scatter by pairs, an addition in the order of ranks and a gather. `E` is a run of elements: of the host, or of a device.
 */
export class MessageCommunicator<E> implements Communicator {
  readonly rank: number
  readonly size: number
  readonly carrier: Carrier<E>
  readonly #memory: Memory<E>
  readonly #isGroup: boolean
  /** The latest call that all ranks make. The next one begins after it: messages have no other mark than their order. */
  #turn: Promise<unknown> = Promise.resolve()
  /** The latest `send`: the next one leaves after it. */
  #left: Promise<unknown> = Promise.resolve()

  constructor(carrier: Carrier<E>, memory: Memory<E>, isGroup = false) {
    this.rank = carrier.rank
    this.size = carrier.size
    this.carrier = carrier
    this.#memory = memory
    this.#isGroup = isGroup
  }

  async allReduce(tensors: readonly Tensor[], reduction: Reduction = 'sum'): Promise<Tensor[]> {
    for (const { dtype } of tensors) checkReduction('allReduce', dtype, reduction)
    return this.#makeInTurn((_, results) =>
      this.#reduceAll(tensors, reduction, (space, elements, like) => results.push(space.tensor(elements, like))),
    )
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
        problem: `[${shape}] cannot be shared by ${this.size} ranks along its first axis`,
        fix: 'pad it to a multiple of the ranks',
      })
    }
    return this.#inTurn(async space => {
      const share = placesOf(space, await this.#memory.of(tensor), evenStarts(size, this.size))
      const own = space.make(dtype, size / this.size)
      await this.#reduceShare(space, own, size / this.size, share, { dtype, reduction })
      return space.tensor(own, { shape: [shape[0] / this.size, ...shape.slice(1)], dtype, backend })
    })
  }

  async reduceShares(shares: Shares, into?: readonly Tensor[]): Promise<readonly Tensor[]> {
    const dtype = checkShares('reduceShares', shares, this.size)
    const mine = shares[this.rank]
    if (into !== undefined) checkOwn('reduceShares', mine, into)
    if (dtype === null) return []
    const made = await this.#makeInTurn((_, results) => {
      const own = mine.map((rows, i) => {
        const finish = (space: Workspace<E>, elements: E) => {
          if (into !== undefined) space.write(into[i], elements)
          else results.push(space.tensor(elements, { shape: shapeOf(rows), dtype, backend: rows.tensor.backend }))
        }
        return { target: { length: lengthOf([elementsOf(rows)]), finish }, at: 0 }
      })
      return this.#bucketByBucket(shares, {
        dtype,
        give: shares,
        meet: (space, place, bucket) => {
          const length = lengthOf(bucket[this.rank])
          return this.#reduceShare(space, place(this.rank), length, place, { dtype, reduction: 'sum' })
        },
        take: shares.map((_, rank) => (rank === this.rank ? own : [])),
      })
    })
    return into ?? made
  }

  async gatherShares(shares: Shares, own: readonly Tensor[]): Promise<void> {
    const dtype = checkShares('gatherShares', shares, this.size)
    checkOwn('gatherShares', shares[this.rank], own)
    const tensors = wholeTensors('gatherShares', shares)
    if (dtype === null) return
    const targetOf = (tensor: Tensor): [Tensor, Target<E>] => {
      // What is all of this rank's lies where it should.
      const finish = (space: Workspace<E>, elements: E) => own.includes(tensor) || space.write(tensor, elements)
      return [tensor, { length: tensor.size, finish }]
    }
    const targets = new Map(tensors.map(targetOf))
    const given = own.map(tensor => ({ tensor, from: 0, to: tensor.shape[0] ?? 1 }))
    return this.#inTurn(() =>
      this.#bucketByBucket(shares, {
        dtype,
        give: shares.map((_, rank) => (rank === this.rank ? given : [])),
        meet: (_, place) => this.#exchange(() => place(this.rank), place),
        take: shares.map(share =>
          share.map(rows => ({ target: targets.get(rows.tensor) as Target<E>, at: elementsOf(rows).from })),
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
    return this.#inTurn(async space => {
      const take = coming ?? [...(await this.carrier.numbers(Int32Array.from(counts)))]
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

  async broadcast(tensors: readonly Tensor[], root = 0): Promise<Tensor[]> {
    this.#checkRank('broadcast', root)
    return this.#makeInTurn(async (space, results) => {
      for (const tensor of tensors) {
        const elements = this.rank === root ? await this.#memory.of(tensor) : space.make(tensor.dtype, tensor.size)
        await this.#passOn(elements, root)
        results.push(space.tensor(elements, tensor))
      }
    })
  }

  async send(tensor: Tensor, to: number): Promise<void> {
    this.#checkRank('send', to, this.rank)
    const left = this.#left.then(async () => {
      const elements = await this.#memory.of(tensor)
      return { done: this.carrier.send(elements, to) }
    })
    this.#left = left.catch(() => undefined)
    await (await left).done
  }

  async receive(like: TensorLike, from: number): Promise<Tensor> {
    this.#checkRank('receive', from, this.rank)
    return this.#working(async space => {
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
    await Promise.all([this.#turn, this.#left])
    await this.carrier.close()
  }

  #inTurn<T>(call: (space: Workspace<E>) => Promise<T>): Promise<T> {
    const done = this.#turn.then(() => this.#working(call))
    this.#turn = done.catch(() => undefined)
    return done
  }

  async #working<T>(call: (space: Workspace<E>) => Promise<T>): Promise<T> {
    const space = this.#memory.open()
    try {
      return await call(space)
    } finally {
      space.close()
    }
  }

  /** A call that makes several tensors, and leaves none behind when it fails. */
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

  async #bucketByBucket(shares: Shares, { dtype, give, meet, take }: ShareExchange<E>): Promise<void> {
    const sources = new Sources(this.#memory, give.flat())
    const assembly = new Assembly(this.#memory, dtype)
    const carry = (bucket: ReadonlyArray<readonly Part[]>) =>
      this.#working(async space => {
        const starts = startsOf(bucket.map(lengthOf))
        const flat = space.make(dtype, starts[this.size])
        const placed = bucket.map((parts, rank) => {
          const within = startsOf(parts.map(part => lengthOf([part])))
          return parts.map((part, i) => ({
            ...part,
            place: space.part(flat, starts[rank] + within[i], starts[rank] + within[i + 1]),
          }))
        })
        for (const [rank, rows] of give.entries()) {
          if (rows.length === 0) continue
          for (const { index, from, to, place } of placed[rank])
            space.copy(place, await sources.take(space, rows[index], from, to))
        }
        await meet(space, placesOf(space, flat, starts), bucket)
        for (const [rank, rows] of take.entries()) {
          if (rows.length === 0) continue
          for (const { index, from, to, place } of placed[rank]) {
            const { target, at } = rows[index]
            assembly.put(space, target, at + from, place, to - from)
          }
        }
      })
    try {
      for (const bucket of partsInBuckets(shares, Math.ceil(bucketElements / this.size))) await carry(bucket)
    } finally {
      assembly.close()
    }
  }

  /** `finish` is handed the reduced elements of each tensor. */
  async #reduceAll(
    tensors: readonly Tensor[],
    reduction: Reduction,
    finish: (space: Workspace<E>, elements: E, tensor: Tensor) => void,
  ): Promise<void> {
    const reduceBucket = (bucket: readonly Tensor[]) =>
      this.#working(async space => {
        const { dtype } = bucket[0]
        const starts = startsOf(bucket.map(({ size }) => size))
        const flat = space.make(dtype, starts[bucket.length])
        const place = placesOf(space, flat, starts)
        const elements = await Promise.all(bucket.map(tensor => this.#memory.of(tensor)))
        for (const [i, from] of elements.entries()) space.copy(place(i), from)
        const even = evenStarts(starts[bucket.length], this.size)
        const share = placesOf(space, flat, even)
        const own = share(this.rank)
        await this.#reduceShare(space, own, even[this.rank + 1] - even[this.rank], share, { dtype, reduction })
        await this.#exchange(() => own, share)
        for (const [i, tensor] of bucket.entries()) finish(space, place(i), tensor)
      })
    for (const bucket of bucketsOf(tensors)) await reduceBucket(bucket)
  }

  /** `to` becomes this rank's share, reduced over all ranks: `length` elements. It may be where that share lies. */
  async #reduceShare(
    space: Workspace<E>,
    to: E,
    length: number,
    share: Share<E>,
    { dtype, reduction }: { readonly dtype: DType; readonly reduction: Reduction },
  ): Promise<void> {
    const parts = Array.from({ length: this.size }, (_, rank) =>
      rank === this.rank ? share(rank) : space.make(dtype, length),
    )
    await this.#exchange(share, rank => parts[rank])
    space.reduce(to, parts, dtype, reduction)
  }

  /** Gives every other rank its elements, and takes those of each. */
  async #exchange(give: Share<E>, take: Share<E>): Promise<void> {
    const messages: Array<Message<E>> = []
    for (let distance = 1; distance < this.size; distance++) {
      // Everyone begins with another rank.
      const to = (this.rank + distance) % this.size
      const from = (this.rank - distance + this.size) % this.size
      messages.push({ from, elements: take(from) }, { to, elements: give(to) })
    }
    await this.carrier.exchange(messages)
  }

  /** The elements of rank `root` to all, along a binomial tree. */
  async #passOn(elements: E, root: number): Promise<void> {
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
    const refuse = (problem: string, fix: string) => new MoeError({ code: 'E_CONFIG', op: 'group', problem, fix })
    if (this.#isGroup) throw refuse('this is a group already', 'make groups of the ranks that it is of')
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
function startsOf(counts: readonly number[], width = 1): number[] {
  const starts = [0]
  for (const count of counts) starts.push((starts.at(-1) as number) + count * width)
  return starts
}

/** As many elements for each of the ranks, up to one. */
const evenStarts = (length: number, ranks: number) =>
  Array.from({ length: ranks + 1 }, (_, rank) => Math.floor((rank * length) / ranks))

const placesOf =
  <E>(space: Workspace<E>, of: E, starts: readonly number[]): Share<E> =>
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
