/** @file Ranks that divide work, such as evaluation and sampling: each does its share, and the results are gathered. */
import { isMoeError, MoeError, type Tensor } from '@moe/core'
import { orInterrupted } from './interrupt.ts'
import { gatherValues, type Ranks } from './ranks.ts'

/** The failure of a rank, as reported to the others. */
interface Failure {
  readonly code: MoeError['code']
  readonly op: string
  readonly problem: string
}

/** The result of a rank; null if it was interrupted. */
type Outcome<T> = { readonly result: readonly T[] | null } | { readonly failure: Failure }

export interface RankGroupOptions {
  /** The ranks that train together. */
  readonly ranks: Ranks | undefined
  /** A tensor on the backend that messages use. */
  readonly like: Tensor
  /** Saves a checkpoint after a failure. */
  readonly save: () => Promise<void>
}

/** Several ranks, or a single process. */
export class RankGroup {
  readonly rank: number
  readonly size: number
  readonly #options: RankGroupOptions | undefined

  constructor(options?: RankGroupOptions) {
    this.rank = options?.ranks?.rank ?? 0
    this.size = options?.ranks?.size ?? 1
    this.#options = options
  }

  /** Gathers a JSON value of every rank, in order of ranks. */
  async gather<T>(own: T): Promise<T[]> {
    const { ranks, like } = this.#options ?? {}
    return ranks && like ? gatherValues(ranks, own, like) : [own]
  }

  /** A rank's share of `count` items, by default this rank's. Shares are contiguous and differ by at most one item. */
  share(count: number, rank = this.rank): { readonly from: number; readonly to: number } {
    const begin = (rank: number) => Math.floor((rank * count) / this.size)
    return { from: begin(rank), to: begin(rank + 1) }
  }

  /**
   * Runs `work` on each rank and concatenates the results of all ranks; null if `signal` interrupted it on any rank. If
   * it fails on any rank, all save a checkpoint and throw.
   *
   * @param options.save false if a failure may be that of the weights, which are then not saved
   * @throws the error on the rank that failed, and a MoeError with the same problem on the others
   */
  async all<T>(signal: AbortSignal, work: () => Promise<readonly T[]>, { save = true } = {}): Promise<T[] | null> {
    let cause: unknown
    const own = await orInterrupted(signal, work()).then(
      (result): Outcome<T> => ({ result }),
      (error): Outcome<T> => {
        cause = error
        return { failure: failureOf(error) }
      },
    )
    const outcomes = await this.gather(own)
    const results: T[] = []
    let failed: MoeError | undefined
    for (const [rank, outcome] of outcomes.entries()) {
      if ('failure' in outcome) failed ??= failedOnRank(rank, outcome.failure)
      else if (outcome.result === null) return null
      else results.push(...outcome.result)
    }
    if (failed === undefined) return results
    // An error while saving is ignored: the first error is reported.
    const saved = await (save && this.#options ? this.#options.save() : Promise.resolve()).then(
      () => true,
      () => false,
    )
    // Launchers kill all processes when one exits with an error, so all wait until the checkpoint is saved. If saving
    // failed, other ranks may not get here.
    if (saved) await this.gather(null).catch(() => undefined)
    throw 'failure' in own ? cause : failed
  }
}

const failedOnRank = (rank: number, { code, op, problem }: Failure) =>
  new MoeError({ code, op, problem: `on rank ${rank}: ${problem}`, fix: "see that rank's own error for details" })

function failureOf(error: unknown): Failure {
  if (isMoeError(error)) return { code: error.code, op: error.op, problem: error.problem }
  return { code: 'E_DATA', op: 'train', problem: error instanceof Error ? error.message : `${error}` }
}
