/** @file What stages hand to each other: activations onwards, gradients back. */
import { keep, type Tensor } from '@moe/core'
import type { Communicator, TensorLike } from '../communicator/communicator.ts'
import { type PipelineSchedule, partsOf, type StagePass } from '../schedule/schedule.ts'

type Kind = 'activation' | 'gradient'

/** What the stage of this pass waits for. */
interface Message extends StagePass {
  readonly kind: Kind
}

const keyOf = ({ kind, stage, microBatch }: Message) => `${kind} ${stage} ${microBatch}`

/**
 * Messages carry no name: those of one rank to another arrive in the order in which they are sent, and the schedule, which all know, says what that order is. So what
 * comes before it is needed waits here.
 */
export class Mail {
  readonly #ranks: Communicator
  readonly #homes: ReadonlyMap<string, number>
  readonly #slots = new Map<string, Slot>()
  #discarded = false
  readonly #receiving: Array<Promise<void>> = []

  /** @param between what goes from a stage to the next */
  constructor(schedule: PipelineSchedule, ranks: Communicator, between: TensorLike) {
    this.#ranks = ranks
    this.#homes = homesOf(schedule)
    for (const from of schedule.ranks.keys()) {
      if (from !== ranks.rank) this.#receiving.push(this.#receive(from, this.#sentBy(schedule, from), between))
    }
  }

  /** Hands a tensor to the rank of that pass. Resolves when the tensor may be freed. */
  async send(tensor: Tensor, message: Message): Promise<void> {
    const to = this.#homes.get(`${message.stage} ${message.microBatch}`) as number
    if (to === this.#ranks.rank) this.#slot(message).resolve(keep(tensor.detach()))
    else await this.#ranks.send(tensor, to)
  }

  /** Takes what this pass waits for; it is the caller's then. */
  async take(message: Message): Promise<Tensor> {
    const tensor = await this.#slot(message).promise
    this.#slots.delete(keyOf(message))
    return tensor
  }

  /** Resolves when all has come. */
  async end(): Promise<void> {
    await Promise.all(this.#receiving)
  }

  /** Frees what has come and nobody took, and what is still to come. */
  discard(): void {
    this.#discarded = true
    for (const { promise } of this.#slots.values()) {
      promise.then(
        tensor => tensor.dispose(),
        () => {},
      )
    }
  }

  #slot(message: Message): Slot {
    const key = keyOf(message)
    const slot = this.#slots.get(key) ?? new Slot()
    this.#slots.set(key, slot)
    return slot
  }

  /** Messages of a rank to this one, in the order of sending. */
  #sentBy({ ranks, stages }: PipelineSchedule, from: number): Message[] {
    const sent: Message[] = []
    for (const { kind, stage, microBatch } of ranks[from].flatMap(partsOf)) {
      if (kind === 'forward' && stage < stages - 1) sent.push({ kind: 'activation', stage: stage + 1, microBatch })
      if ((kind === 'backward' || kind === 'backwardInput') && stage > 0)
        sent.push({ kind: 'gradient', stage: stage - 1, microBatch })
    }
    return sent.filter(message => this.#homes.get(`${message.stage} ${message.microBatch}`) === this.#ranks.rank)
  }

  /** One after the other, so that memory is taken for what comes and not for all that will. */
  async #receive(from: number, messages: readonly Message[], between: TensorLike): Promise<void> {
    for (const [i, message] of messages.entries()) {
      try {
        const tensor = keep(await this.#ranks.receive(between, from))
        if (this.#discarded) tensor.dispose()
        else this.#slot(message).resolve(tensor)
      } catch (error) {
        for (const other of messages.slice(i)) this.#slot(other).reject(error)
        throw error
      }
    }
  }
}

/** Where a message is put and taken, whichever comes first. */
class Slot {
  resolve!: (tensor: Tensor) => void
  reject!: (error: unknown) => void
  readonly promise = new Promise<Tensor>((resolve, reject) => {
    this.resolve = resolve
    this.reject = reject
  })

  constructor() {
    // Whoever takes it learns of a failure; it may be that nobody does any more.
    this.promise.catch(() => {})
  }
}

/** The rank of every pass of a stage with a micro-batch. */
function homesOf(schedule: PipelineSchedule): Map<string, number> {
  const homes = new Map<string, number>()
  for (const [rank, actions] of schedule.ranks.entries())
    for (const { kind, stage, microBatch } of actions.flatMap(partsOf))
      if (kind === 'forward') homes.set(`${stage} ${microBatch}`, rank)
  return homes
}
