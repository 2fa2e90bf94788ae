/** @file Messages between pipeline stages: activations to the next stage, gradients to the previous one. */
import { keep, type Tensor } from '@moe/core'
import type { Communicator, TensorLike } from '../communicator/communicator.ts'
import { type PipelineSchedule, partsOf, type StagePass } from '../schedule/schedule.ts'

type Kind = 'activation' | 'gradient'

/** A message, identified by the pass that receives it. */
interface Message extends StagePass {
  readonly kind: Kind
}

const keyOf = ({ kind, stage, microBatch }: Message) => `${kind} ${stage} ${microBatch}`

/**
 * Sends and receives the tensors between stages. Messages carry no identifier: they arrive from each rank in the order of sending, which all ranks know from the
 * schedule. Messages that arrive before they are needed are stored here.
 */
export class StageMessages {
  readonly #ranks: Communicator
  readonly #homes: ReadonlyMap<string, number>
  readonly #slots = new Map<string, Slot>()
  #discarded = false
  #failure: { readonly reason: unknown } | undefined
  readonly #receiving: Array<Promise<void>> = []

  /** @param activations shape and dtype of the tensors between stages */
  constructor(schedule: PipelineSchedule, ranks: Communicator, activations: TensorLike) {
    this.#ranks = ranks
    this.#homes = homesOf(schedule)
    for (const from of schedule.ranks.keys()) {
      if (from !== ranks.rank) this.#receiving.push(this.#receive(from, this.#sentBy(schedule, from), activations))
    }
  }

  /** Sends a tensor to the rank that runs the receiving pass. Resolves when the tensor may be freed. */
  async send(tensor: Tensor, message: Message): Promise<void> {
    const to = this.#homes.get(`${message.stage} ${message.microBatch}`) as number
    if (to !== this.#ranks.rank) await this.#ranks.send(tensor, to).catch(error => this.#fail(error))
    else if (!this.#discarded) this.#slot(message).resolve(keep(tensor.detach()))
  }

  /** Waits for a message, or for the failure of one that is sent. The caller owns the tensor. */
  async take(message: Message): Promise<Tensor> {
    const tensor = await this.#slot(message).promise
    this.#slots.delete(keyOf(message))
    return tensor
  }

  /** Resolves when all messages have arrived. */
  async end(): Promise<void> {
    await Promise.all(this.#receiving)
  }

  /** Frees messages that have arrived and were not taken, and those that are still to arrive. */
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
    if (this.#failure) slot.reject(this.#failure.reason)
    return slot
  }

  /** If a message cannot be sent, others that this rank waits for may not arrive. */
  #fail(reason: unknown): never {
    this.#failure = { reason }
    for (const slot of this.#slots.values()) slot.reject(reason)
    throw reason
  }

  /** The messages from a rank to this one, in the order of sending. */
  #sentBy({ ranks, stages }: PipelineSchedule, from: number): Message[] {
    const sent: Message[] = []
    for (const { kind, stage, microBatch } of ranks[from].flatMap(partsOf)) {
      if (kind === 'forward' && stage < stages - 1) sent.push({ kind: 'activation', stage: stage + 1, microBatch })
      if ((kind === 'backward' || kind === 'backwardInput') && stage > 0)
        sent.push({ kind: 'gradient', stage: stage - 1, microBatch })
    }
    return sent.filter(message => this.#homes.get(`${message.stage} ${message.microBatch}`) === this.#ranks.rank)
  }

  /** Receives one message after the other, so that memory is allocated only for the next one. */
  async #receive(from: number, messages: readonly Message[], activations: TensorLike): Promise<void> {
    for (const [i, message] of messages.entries()) {
      try {
        const tensor = keep(await this.#ranks.receive(activations, from))
        if (this.#discarded) tensor.dispose()
        else this.#slot(message).resolve(tensor)
      } catch (error) {
        for (const other of messages.slice(i)) this.#slot(other).reject(error)
        throw error
      }
    }
  }
}

/** A promise for a message, created by whichever side comes first. */
class Slot {
  resolve!: (tensor: Tensor) => void
  reject!: (error: unknown) => void
  readonly promise = new Promise<Tensor>((resolve, reject) => {
    this.resolve = resolve
    this.reject = reject
  })

  constructor() {
    // A failure is reported by `take`. After another failure nobody may take the message: avoid an unhandled rejection.
    this.promise.catch(() => {})
  }
}

/** The rank that runs each stage for each micro-batch, by `"stage microBatch"`. */
export function homesOf(schedule: PipelineSchedule): Map<string, number> {
  const homes = new Map<string, number>()
  for (const [rank, actions] of schedule.ranks.entries())
    for (const { kind, stage, microBatch } of actions.flatMap(partsOf))
      if (kind === 'forward') homes.set(`${stage} ${microBatch}`, rank)
  return homes
}
