/**
 * @file The state of a sharded optimizer, in the form in which a single rank would store it: checkpoints do not depend
 *   on the number of ranks.
 */
import {
  type Backend,
  type DType,
  dtypeBytes,
  fromHost,
  type HostArray,
  hostArray,
  MoeError,
  type Shape,
  type StateEntry,
  type StateSource,
  sameShape,
  sizeOf,
} from '@moe/core'
import type { ModelOnRanks } from '../model-on-ranks.ts'
import type { Optimizer } from '../optim/optimizer.ts'
import { gatherValues, type SendingRanks } from '../ranks.ts'
import type { StoredOptimizer } from './save-load.ts'

/** The part of an entry that a rank has. */
interface Piece {
  readonly name: string
  readonly dtype: DType
  readonly shape: Shape
  /** Index of its first row in the complete entry. */
  readonly firstRow: number
}

interface WholeEntry extends Omit<Piece, 'firstRow'> {
  readonly pieces: ReadonlyArray<Piece & { readonly rank: number }>
}

export class OptimizerOnRanks implements StoredOptimizer {
  readonly #ranks: SendingRanks
  readonly #backend: Backend
  readonly #optimizer: Optimizer
  readonly #own: ReadonlyMap<string, Piece>
  readonly #whole: ReadonlyMap<string, WholeEntry>

  /**
   * All ranks must call it. @throws MoeError E_CONFIG if the optimizer does not say which parameter its state belongs
   * to
   */
  static async of(
    { ranks, parameters }: Pick<ModelOnRanks, 'ranks' | 'parameters'>,
    optimizer: Optimizer,
    backend: Backend,
  ): Promise<OptimizerOnRanks> {
    const own = piecesOf(parameters, optimizer)
    const lists = await gatherValues(ranks, own, { backend })
    return new OptimizerOnRanks(ranks, backend, optimizer, own, lists)
  }

  private constructor(
    ranks: SendingRanks,
    backend: Backend,
    optimizer: Optimizer,
    own: readonly Piece[],
    lists: ReadonlyArray<readonly Piece[]>,
  ) {
    this.#ranks = ranks
    this.#backend = backend
    this.#optimizer = optimizer
    this.#own = new Map(own.map(piece => [piece.name, piece]))
    this.#whole = wholeOf(lists)
  }

  get name(): string {
    return this.#optimizer.name
  }

  /**
   * The complete entries, for rank 0. It must read each entry once and in this order, while the other ranks call
   * `send`.
   */
  entries(): StateEntry[] {
    const own = this.#ownData()
    return [...this.#whole.values()].map(({ name, dtype, shape, pieces }) => ({
      name,
      dtype,
      shape,
      data: async () => {
        const all = hostArray(dtype, sizeOf(shape))
        for (const piece of pieces) {
          const data = await (piece.rank === 0 ? own(name) : this.#receive(piece))
          all.set(data, piece.firstRow * widthOf(shape))
        }
        return all
      },
    }))
  }

  /** Sends this rank's parts to rank 0, which reads `entries`. */
  async send(): Promise<void> {
    const own = this.#ownData()
    for (const { name, dtype, shape, rank } of [...this.#whole.values()].flatMap(({ pieces }) => pieces)) {
      if (rank !== this.#ranks.rank) continue
      const tensor = fromHost(await own(name), shape, dtype, this.#backend)
      await this.#ranks.send(tensor, 0).finally(() => tensor.dispose())
    }
  }

  /** Loads this rank's part of a state that any number of ranks stored. */
  async load(source: StateSource, steps: number): Promise<void> {
    const stored = Array.from(source.keys())
    await this.#optimizer.load(
      {
        // Entries of other ranks are left out. Entries that no rank has are kept, so that they are reported as
        // unexpected.
        keys: () => stored.filter(name => this.#own.has(name) || !this.#whole.has(name)),
        info: name => {
          const info = source.info(name)
          const isWhole = sameShape(info.shape, this.#whole.get(name)?.shape ?? [])
          return isWhole ? { ...info, shape: this.#own.get(name)?.shape ?? [] } : info
        },
        read: async name => {
          const { shape, firstRow } = this.#own.get(name) as Piece
          const from = firstRow * widthOf(shape)
          return (await source.read(name)).subarray(from, from + sizeOf(shape))
        },
      },
      steps,
    )
  }

  #ownData(): (name: string) => Promise<HostArray> {
    const entries = new Map(this.#optimizer.entries().map(({ name, data }) => [name, data]))
    return name => (entries.get(name) as StateEntry['data'])()
  }

  async #receive({ dtype, shape, rank }: WholeEntry['pieces'][number]): Promise<HostArray> {
    using tensor = await this.#ranks.receive({ dtype, shape, backend: this.#backend }, rank)
    return await tensor.data()
  }
}

/** Elements per row. */
const widthOf = (shape: Shape) => sizeOf(shape.slice(1))

function piecesOf(parameters: ModelOnRanks['parameters'], optimizer: Optimizer): Piece[] {
  const firstRows = new Map(parameters.map(({ parameter, firstRow = 0 }) => [parameter, firstRow]))
  return optimizer.entries().map(({ name, dtype, shape, parameter }) => {
    const firstRow = parameter && firstRows.get(parameter)
    if (firstRow !== undefined && sameShape(shape, parameter?.shape ?? [])) return { name, dtype, shape, firstRow }
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'train',
      problem: `${optimizer.name} does not say which parameter its state ${name} belongs to, element by element, so it cannot be stored if ranks train parts of a model`,
      fix: 'set `parameter` in its entries, or use AdamW or Muon',
    })
  })
}

/**
 * The complete entries that the ranks have together, in file order. If several ranks have the same rows, those of the
 * first one are used.
 */
function wholeOf(lists: ReadonlyArray<readonly Piece[]>): Map<string, WholeEntry> {
  const pieces = new Map<string, Map<number, WholeEntry['pieces'][number]>>()
  for (const [rank, list] of lists.entries()) {
    for (const piece of list) {
      const byRow = pieces.get(piece.name) ?? new Map()
      if (!byRow.has(piece.firstRow)) byRow.set(piece.firstRow, { ...piece, rank })
      pieces.set(piece.name, byRow)
    }
  }
  const whole = Array.from(pieces, ([name, byRow]): WholeEntry => {
    const all = [...byRow.values()].sort((a, b) => a.firstRow - b.firstRow)
    const [{ dtype, shape }] = all
    const rows = all.reduce((sum, piece) => sum + piece.shape[0], 0)
    return { name, dtype, shape: all.length > 1 ? [rows, ...shape.slice(1)] : shape, pieces: all }
  })
  whole.sort((a, b) => dtypeBytes[b.dtype] - dtypeBytes[a.dtype])
  return new Map(whole.map(entry => [entry.name, entry]))
}
