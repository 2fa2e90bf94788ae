/**
 * @file The weights of a model whose parts are on several ranks, for checkpoints: rank 0 reads them as if it had the
 *   whole model, one parameter (or one expert) at a time.
 */
import {
  type Backend,
  type HostArray,
  hostArray,
  type LocalParameter,
  type Module,
  type NamedParameter,
  namedParameters,
  noGrad,
  type RowReader,
  scope,
  sizeOf,
  type Tensor,
  tensor,
} from '@moe/core'
import type { ModelOnRanks } from '../model-on-ranks.ts'
import { gatherValues } from '../ranks.ts'

/** Rows of a parameter that a rank holds. */
interface Piece {
  readonly name: string
  readonly from: number
  readonly to: number
}

const rowsIn = ({ shape }: Tensor) => shape[0] ?? 1

const pieceOf = ({ name, parameter, firstRow = 0 }: LocalParameter): Piece => ({
  name,
  from: firstRow,
  to: firstRow + rowsIn(parameter),
})

export class WeightsOnRanks {
  readonly #ranks: ModelOnRanks['ranks']
  readonly #backend: Backend
  readonly #named: readonly NamedParameter[]
  readonly #own: ReadonlyMap<string, LocalParameter>
  /** The pieces of each rank, by name. */
  readonly #held: ReadonlyArray<ReadonlyMap<string, Piece>>

  /** All ranks must call it. */
  static async of({ ranks, weights }: ModelOnRanks, model: Module): Promise<WeightsOnRanks> {
    const named = namedParameters(model)
    const { backend } = named[0].parameter
    const lists = await gatherValues(ranks, weights.map(pieceOf), { backend })
    return new WeightsOnRanks(ranks, backend, named, weights, lists)
  }

  private constructor(
    ranks: ModelOnRanks['ranks'],
    backend: Backend,
    named: readonly NamedParameter[],
    weights: readonly LocalParameter[],
    lists: ReadonlyArray<readonly Piece[]>,
  ) {
    this.#ranks = ranks
    this.#backend = backend
    this.#named = named
    this.#own = new Map(weights.map(own => [own.name, own]))
    this.#held = lists.map(list => new Map(list.map(piece => [piece.name, piece])))
  }

  /**
   * Runs `fn` on rank 0, where `stateDict` reads the complete model meanwhile. The other ranks must call `send`. The
   * weights must not change until both are done.
   */
  async read<T>(fn: () => Promise<T>): Promise<T> {
    const absent = [...this.#named.entries()].filter(([, { parameter }]) => parameter.handle === null)
    for (const [index, { parameter }] of absent) parameter.elsewhere = this.#reader(index)
    try {
      return await fn()
    } finally {
      for (const [, { parameter }] of absent) parameter.elsewhere = null
      for (let rank = 1; rank < this.#ranks.size; rank++) await this.#request(rank, [-1, 0, 0])
    }
  }

  /** Sends rank 0 what it asks for while it runs `read`. */
  async send(): Promise<void> {
    for (;;) {
      using request = await this.#ranks.receive({ shape: [3], dtype: 'i32', backend: this.#backend }, 0)
      const [index, from, to] = await request.values()
      if (index < 0) return
      using rows = this.#rows(this.#named[index].name, from, to)
      await this.#ranks.send(rows, 0)
    }
  }

  /** Reads rows of a parameter from the ranks that hold them. */
  #reader(index: number): RowReader {
    const { name, parameter } = this.#named[index]
    const width = sizeOf(parameter.shape.slice(1))
    return async (from, to) => {
      const all = hostArray(parameter.dtype, (to - from) * width)
      for (let at = from; at < to; ) {
        const start = at
        const rank = this.#held.findIndex(held => {
          const piece = held.get(name)
          return piece !== undefined && piece.from <= start && start < piece.to
        })
        const end = Math.min(to, (this.#held[rank].get(name) as Piece).to)
        all.set(await this.#readFrom(rank, index, start, end), (start - from) * width)
        at = end
      }
      return all
    }
  }

  async #readFrom(rank: number, index: number, from: number, to: number): Promise<HostArray> {
    const { name, parameter } = this.#named[index]
    if (rank === this.#ranks.rank) {
      using rows = this.#rows(name, from, to)
      return await rows.data()
    }
    await this.#request(rank, [index, from, to])
    const { dtype, shape } = parameter
    const like = { dtype, shape: shape.length === 0 ? shape : [to - from, ...shape.slice(1)], backend: this.#backend }
    using rows = await this.#ranks.receive(like, rank)
    return await rows.data()
  }

  async #request(rank: number, numbers: readonly number[]): Promise<void> {
    using request = tensor(Int32Array.from(numbers), [3], { backend: this.#backend })
    await this.#ranks.send(request, rank)
  }

  /** A copy of rows of a parameter that this rank holds. Rows are numbered as in the complete model. */
  #rows(name: string, from: number, to: number): Tensor {
    const { parameter, firstRow = 0 } = this.#own.get(name) as LocalParameter
    const rows = () => (parameter.rank === 0 ? parameter : parameter.narrow(0, from - firstRow, to - firstRow))
    // Detached, because all rows are the parameter itself.
    return scope(() => noGrad(() => rows().detach()))
  }
}
