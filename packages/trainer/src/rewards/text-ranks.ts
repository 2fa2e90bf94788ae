/** @file Ranks that learn from texts together: each makes and reads its share of them, and all know what is said of all. */
import { isMoeError, MoeError, type Tensor } from '@moe/core'
import { orInterrupted } from '../interrupt.ts'
import { gatherValues, type Ranks } from '../ranks.ts'

/** Why a rank has nothing, as the others are told. */
interface Failure {
  readonly code: MoeError['code']
  readonly op: string
  readonly problem: string
}

/** What a rank has made of its share; null when it was interrupted. */
type Outcome<T> = { readonly made: readonly T[] | null } | { readonly failure: Failure }

export interface TextRanksOptions {
  /** Those that train together. */
  readonly ranks: Ranks | undefined
  /** What they tell each other is put where this lies. */
  readonly like: Tensor
  /** Saves what was learned before something failed. */
  readonly save: () => Promise<void>
}

/** Several ranks, or one alone. */
export class TextRanks {
  readonly rank: number
  readonly size: number
  readonly #options: TextRanksOptions | undefined

  constructor(options?: TextRanksOptions) {
    this.rank = options?.ranks?.rank ?? 0
    this.size = options?.ranks?.size ?? 1
    this.#options = options
  }

  /** A value of every rank that JSON can hold, in their order. */
  async gather<T>(own: T): Promise<T[]> {
    const { ranks, like } = this.#options ?? {}
    return ranks && like ? gatherValues(ranks, own, like) : [own]
  }

  /** Where this rank's share of `count` things begins, and the next one's: runs of equal lengths but for one. */
  share(count: number): { readonly from: number; readonly to: number } {
    const begin = (rank: number) => Math.floor((rank * count) / this.size)
    return { from: begin(this.rank), to: begin(this.rank + 1) }
  }

  /**
   * What `work` makes of the shares of all ranks, one behind the other, once all are done; null when `signal` ended it on one of them.
   * @throws where it fails on one, on all, saved: there what it failed with, elsewhere a MoeError that says the same
   */
  async all<T>(signal: AbortSignal, work: () => Promise<readonly T[]>): Promise<T[] | null> {
    let cause: unknown
    const own = await orInterrupted(signal, work()).then(
      (made): Outcome<T> => ({ made }),
      (error): Outcome<T> => {
        cause = error
        return { failure: failureOf(error) }
      },
    )
    const outcomes = await this.gather(own)
    const made: T[] = []
    let failed: MoeError | undefined
    for (const [rank, outcome] of outcomes.entries()) {
      if ('failure' in outcome) failed ??= elsewhere(rank, outcome.failure)
      else if (outcome.made === null) return null
      else made.push(...outcome.made)
    }
    if (failed === undefined) return made
    // The first error is the one to tell.
    const saved = await (this.#options?.save() ?? Promise.resolve()).then(
      () => true,
      () => false,
    )
    // Launchers end all processes when one has ended with an error. Where saving fails, others may wait to give what is saved.
    if (saved) await this.gather(null).catch(() => undefined)
    throw 'failure' in own ? cause : failed
  }
}

const elsewhere = (rank: number, { code, op, problem }: Failure) =>
  new MoeError({ code, op, problem: `on rank ${rank}, ${problem}`, fix: 'its own error has more' })

function failureOf(error: unknown): Failure {
  if (isMoeError(error)) return { code: error.code, op: error.op, problem: error.problem }
  return { code: 'E_DATA', op: 'train', problem: error instanceof Error ? error.message : `${error}` }
}
