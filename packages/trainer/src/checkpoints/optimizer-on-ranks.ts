/** @file The state of an optimizer of which every rank has a part, as one rank would store it: checkpoints have no trace of ranks. */
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

/** What a rank has of an entry. */
interface Piece {
  readonly name: string
  readonly dtype: DType
  readonly shape: Shape
  /** Place of its first row in the whole. */
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

  /** All ranks call it. @param of what this rank trains. @throws MoeError E_CONFIG for an optimizer that does not say whose state it has */
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

  /** For rank 0, which reads each entry once and in this order, while the others `send`. */
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

  /** Gives rank 0 what it reads of this rank. */
  async send(): Promise<void> {
    const own = this.#ownData()
    for (const { name, dtype, shape, rank } of [...this.#whole.values()].flatMap(({ pieces }) => pieces)) {
      if (rank !== this.#ranks.rank) continue
      const tensor = fromHost(await own(name), shape, dtype, this.#backend)
      await this.#ranks.send(tensor, 0).finally(() => tensor.dispose())
    }
  }

  /** Takes this rank's part of what any number of ranks has stored. */
  async load(source: StateSource, steps: number): Promise<void> {
    const stored = Array.from(source.keys())
    await this.#optimizer.load(
      {
        // Of what no rank knows, each says so.
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

/** Elements of a row. */
const widthOf = (shape: Shape) => sizeOf(shape.slice(1))

function piecesOf(parameters: ModelOnRanks['parameters'], optimizer: Optimizer): Piece[] {
  const firstRows = new Map(parameters.map(({ parameter, firstRow = 0 }) => [parameter, firstRow]))
  return optimizer.entries().map(({ name, dtype, shape, parameter }) => {
    const firstRow = parameter && firstRows.get(parameter)
    if (firstRow !== undefined && sameShape(shape, parameter?.shape ?? [])) return { name, dtype, shape, firstRow }
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'train',
      problem: `${optimizer.name} does not say which parameter ${name} is the state of, element by element: it cannot be stored where ranks train parts of a model`,
      fix: 'give its entries their parameter, or use AdamW or Muon',
    })
  })
}

/** What the ranks have together, in the order of a file; of what several have, the first one's. */
function wholeOf(lists: ReadonlyArray<readonly Piece[]>): Map<string, WholeEntry> {
  const pieces = new Map<string, Array<WholeEntry['pieces'][number]>>()
  for (const [rank, list] of lists.entries())
    for (const piece of list) pieces.set(piece.name, [...(pieces.get(piece.name) ?? []), { ...piece, rank }])
  const whole = Array.from(pieces, ([name, all]): WholeEntry => {
    const [{ dtype, shape }] = all
    const together = inARow(all)
    const rows = together.reduce((sum, piece) => sum + piece.shape[0], 0)
    return { name, dtype, shape: together.length > 1 ? [rows, ...shape.slice(1)] : together[0].shape, pieces: together }
  })
  whole.sort((a, b) => dtypeBytes[b.dtype] - dtypeBytes[a.dtype])
  return new Map(whole.map(entry => [entry.name, entry]))
}

/** One after the other, from the first row on: groups of ranks that have the same parameter may have cut it in different places. */
function inARow<P extends Piece>(pieces: readonly P[]): P[] {
  const row: P[] = []
  for (let next: P | undefined, end = 0; ; end += next.shape[0] || 1) {
    next = pieces.find(({ firstRow }) => firstRow === end)
    if (next === undefined) return row
    row.push(next)
  }
}
