/** @file Experts sharded over ranks: the groups of ranks that share them, and the shard of this rank. */
import {
  copyRows,
  type LocalParameter,
  type Module,
  type NamedParameter,
  namedParameters,
  type Parameter,
  QuantizedParameter,
  type Tensor,
  zeros,
} from '@moe/core'
import { configError } from '../check-call.ts'
import type { Communicator } from '../communicator/communicator.ts'
import type { PiecewisePass } from './piecewise-pass.ts'
import { type ExpertsShard, type RoutedTokens, routeOverRanks } from './route-over-ranks.ts'

/** A layer whose routed experts can be sharded. Expert parameters are stacked: `[E, ...]`. */
export interface ExpertParallelLayer {
  /** The experts. `copyOf` returns experts `from` to `to` (exclusive) as a separate module. */
  readonly experts: Module & { copyOf(from: number, to: number): Module & ExpertsShard }
}

/** Runs a forward pass in pieces. `PiecewisePass` implements it. */
export interface PieceRunner extends Pick<PiecewisePass, 'run' | 'release'> {
  /** Runs ops on the results of other pieces. Returns leaves, for later pieces. */
  piece(inputs: readonly Tensor[], fn: (...inputs: Tensor[]) => readonly Tensor[]): Tensor[]
}

/** Applies the routed experts of a layer to tokens, `[N, D]`, wherever the experts are. Takes leaves of a pass and returns a leaf. */
export type RouteTokens = (layer: number, tokens: RoutedTokens) => Promise<Tensor>

/** The group of ranks, among those with the same layers, that this rank shares experts with. */
export interface ExpertRanks {
  /** The ranks that share the experts of each layer; this rank's number in the group is the number of its shard. */
  readonly sharing: Communicator
  /** The same ranks, for messages of a backward pass that overlaps a forward pass. */
  readonly back: Communicator
}

/**
 * Divides the ranks with the same layers, which are `stride` apart, into groups of `size` consecutive ones that share the experts.
 * @param options.overlapping whether a forward and a backward pass may run at the same time
 * @throws MoeError E_CONFIG if `size` does not divide the number of ranks with the same layers
 */
export function expertRanks(
  op: string,
  ranks: Communicator,
  size: number,
  { stride = 1, overlapping = false }: { stride?: number; overlapping?: boolean } = {},
): ExpertRanks {
  const all = ranks.size / stride
  if (!Number.isInteger(size) || size < 1 || all % size !== 0) {
    const problem = `expertParallelSize is ${size}, but ${all} ranks have the same layers`
    throw configError(op, problem, `pass a positive integer that divides ${all}`)
  }
  const line = Math.floor(ranks.rank / stride)
  const first = line - (line % size)
  const members = Array.from({ length: size }, (_, i) => (first + i) * stride + (ranks.rank % stride))
  const sharing = size === ranks.size ? ranks : ranks.group(members)
  const back = overlapping ? ranks.group(members) : sharing
  return { sharing, back }
}

/** This rank's experts of a layer, and the model's parameters whose rows they are. */
interface Shard {
  readonly shard: Module & ExpertsShard
  readonly rows: ReadonlyArray<readonly [whole: Parameter, own: Parameter]>
  readonly experts: number
}

/** This rank's shard of the experts of its layers: copies of rows of the model's parameters, which are freed until `gather`. */
export class ExpertShards {
  /** Maps a parameter of the model to this rank's rows of it. */
  readonly rows: ReadonlyMap<Parameter, Parameter>
  readonly #ranks: ExpertRanks
  readonly #layers: ReadonlyMap<number, Shard>

  /** @param layers of this rank, by their number in the model. @throws MoeError E_CONFIG if the ranks do not divide the experts */
  constructor(op: string, layers: ReadonlyMap<number, ExpertParallelLayer>, ranks: ExpertRanks) {
    this.#ranks = ranks
    const shards = new Map<number, Shard>()
    for (const [layer, { experts }] of layers) {
      const shard = shardOf(op, experts, ranks.sharing)
      for (const [whole] of shard.rows) whole.dispose()
      shards.set(layer, shard)
    }
    this.#layers = shards
    this.rows = new Map([...shards.values()].flatMap(({ rows }) => rows))
  }

  /** The ranks that share the experts. */
  get sharing(): Communicator {
    return this.#ranks.sharing
  }

  /** Numbers of the layers. */
  get layers(): number[] {
    return [...this.#layers.keys()]
  }

  /** This rank's experts of a layer, and the number of experts over all ranks. */
  of(layer: number): Pick<Shard, 'shard' | 'experts'> {
    return this.#layers.get(layer) as Shard
  }

  /** The parameter that this rank trains in place of one of the model. */
  own(named: NamedParameter): LocalParameter {
    const parameter = this.rows.get(named.parameter)
    if (parameter === undefined) return named
    const [from, to] = runOf(named.parameter.shape[0], this.#ranks.sharing)
    return { ...named, parameter, firstRow: from, ...(named.slices && { slices: named.slices.slice(from, to) }) }
  }

  /** Takes this rank's experts from the model and frees the model's, if it has them (after `gather`). */
  takeOwn(): void {
    for (const [whole, own] of this.rows) {
      if (whole.handle === null) continue
      copyRows(own, whole, ...runOf(whole.shape[0], this.#ranks.sharing))
      whole.dispose()
    }
  }

  /** Moves all experts of these layers into the model, on all ranks that share them. */
  async gather(): Promise<void> {
    this.takeOwn()
    for (const [whole, own] of this.rows) {
      const gather = (rows: Tensor) => this.#ranks.sharing.allGather(rows)
      if (whole instanceof QuantizedParameter && own instanceof QuantizedParameter) {
        const { scale } = own.weight
        whole.assignQuantized({ ...whole.weight, q: await gather(own), scale: scale && (await gather(scale)) })
      } else whole.assign(await gather(own))
      own.dispose()
    }
  }

  /** The routing function for pieces of this pass. */
  routeIn(pass: PiecewisePass): RouteTokens {
    return (layer, tokens) => {
      const { shard, experts } = this.of(layer)
      const { sharing, back } = this.#ranks
      return routeOverRanks(pass, sharing, shard, tokens, experts, { back })
    }
  }

  /** Gives experts that no token chose a gradient of zeros, as on one rank. */
  completeGradients(): void {
    for (const parameter of this.rows.values())
      if (parameter.trainable) parameter.grad ??= zeros(parameter.shape, { backend: parameter.backend })
  }

  /** Frees this rank's experts, but not the model. */
  dispose(): void {
    for (const own of this.rows.values()) own.dispose()
  }
}

/** The first expert of a rank, and the end. */
const runOf = (experts: number, { rank, size }: Communicator): [number, number] => [
  (rank * experts) / size,
  ((rank + 1) * experts) / size,
]

function shardOf(op: string, whole: ExpertParallelLayer['experts'], ranks: Communicator): Shard {
  const stacked = namedParameters(whole)
  const [experts] = stacked[0].parameter.shape
  if (experts % ranks.size !== 0) {
    const problem = `${experts} experts cannot be divided among ${ranks.size} ranks`
    throw configError(op, problem, `use a number of ranks that divides ${experts}`)
  }
  const shard = whole.copyOf(...runOf(experts, ranks))
  const own = namedParameters(shard)
  return { shard, experts, rows: stacked.map(({ parameter }, i) => [parameter, own[i].parameter] as const) }
}
