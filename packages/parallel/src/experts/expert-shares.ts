/** @file Experts that several ranks share out: which ranks those are, and what this one has of them. */
import {
  type Module,
  type NamedParameter,
  namedParameters,
  noGrad,
  type OwnParameter,
  type Parameter,
  type Tensor,
  zeros,
} from '@moe/core'
import { refusal } from '../check-call.ts'
import type { Communicator } from '../communicator/communicator.ts'
import type { PiecewisePass } from './piecewise-pass.ts'
import { type ExpertsShare, type RoutedTokens, routeOverRanks } from './route-over-ranks.ts'

/** A layer with routed experts. Parameters of experts are stacked, `[E, ...]`. */
export interface SpreadableLayer {
  /** `copyOf` gives those from number `from` to `to` - 1 as a module of its own. */
  readonly experts: Module & { copyOf(from: number, to: number): Module & ExpertsShare }
}

/** What a model in pieces is run by: a `PiecewisePass` is one. */
export interface PieceRunner extends Pick<PiecewisePass, 'run'> {
  /** Ops on results of other pieces; what it gives are leaves for later ones. */
  piece(inputs: readonly Tensor[], fn: (...inputs: Tensor[]) => readonly Tensor[]): Tensor[]
}

/** What the routed experts of a layer make of tokens, `[N, D]`: leaves of a pass to a leaf. */
export type RouteElsewhere = (layer: number, tokens: RoutedTokens) => Promise<Tensor>

/** Ranks that have the same layers. */
export interface ExpertRanks {
  /** Those that share the experts of each layer out: this one has the part of its number among them. */
  readonly sharing: Communicator
  /** The same, for what goes back while another pass goes forward. */
  readonly back: Communicator
  /** Those that have the same part as this one; null where no other has. */
  readonly same: Communicator | null
}

/**
 * Groups of `size` ranks share experts out: of ranks with the same layers, which are `stride` apart, each so many in a row.
 * @param options.overlapping whether passes may be under way at once
 * @throws MoeError E_CONFIG when they cannot be grouped so
 */
export function expertRanks(
  op: string,
  ranks: Communicator,
  size: number,
  { stride = 1, overlapping = false }: { stride?: number; overlapping?: boolean } = {},
): ExpertRanks {
  const all = ranks.size / stride
  if (!Number.isInteger(size) || size < 1 || all % size !== 0) {
    const problem = `experts cannot be shared out to ${size} ranks each where ${all} have the same layers`
    throw refusal(op, problem, 'give an expertParallelSize that divides them')
  }
  const line = Math.floor(ranks.rank / stride)
  const among = (lines: readonly number[]) => lines.map(other => other * stride + (ranks.rank % stride))
  const part = line % size
  const members = among(Array.from({ length: size }, (_, i) => line - part + i))
  const sharing = size === ranks.size ? ranks : ranks.group(members)
  const back = overlapping ? ranks.group(members) : sharing
  const others = among(Array.from({ length: all / size }, (_, i) => i * size + part))
  return { sharing, back, same: others.length === 1 ? null : ranks.group(others) }
}

/** Of a layer: this rank's experts, and whose rows their parameters are. */
interface Share {
  readonly share: Module & ExpertsShare
  readonly rows: ReadonlyArray<readonly [whole: Parameter, own: Parameter]>
  readonly experts: number
}

/** What a rank has of the experts of its layers: copies of rows of the model's parameters, which are freed until `gather`. */
export class ExpertShares {
  /** This rank's rows of a parameter of the model. */
  readonly rows: ReadonlyMap<Parameter, Parameter>
  readonly ranks: ExpertRanks
  readonly #layers: ReadonlyMap<number, Share>

  /** @param layers of this rank, by their number in the model. @throws MoeError E_CONFIG when the ranks do not divide the experts */
  constructor(op: string, layers: ReadonlyMap<number, SpreadableLayer>, ranks: ExpertRanks) {
    this.ranks = ranks
    this.#layers = new Map(Array.from(layers, ([layer, { experts }]) => [layer, shareOf(op, experts, ranks.sharing)]))
    this.rows = new Map([...this.#layers.values()].flatMap(({ rows }) => rows))
    this.takeOwn()
  }

  /** As this rank trains it. */
  own(named: NamedParameter): OwnParameter {
    const parameter = this.rows.get(named.parameter)
    if (parameter === undefined) return named
    const [from, to] = runOf(named.parameter.shape[0], this.ranks.sharing)
    return { ...named, parameter, firstRow: from, ...(named.slices && { slices: named.slices.slice(from, to) }) }
  }

  /** This rank's experts from the model, which loses all, where it has them: it was gathered, or loaded. */
  takeOwn(): void {
    for (const [whole, own] of this.rows) {
      if (whole.handle === null) continue
      own.assign(noGrad(() => whole.narrow(0, ...runOf(whole.shape[0], this.ranks.sharing))))
      whole.dispose()
    }
  }

  /** Moves the experts of these layers into the model, on all ranks that share them out. */
  async gather(): Promise<void> {
    this.takeOwn()
    for (const [whole, own] of this.rows) {
      whole.assign(await this.ranks.sharing.allGather(own))
      own.dispose()
    }
  }

  /** How pieces of this pass reach the experts. */
  routeIn(pass: PiecewisePass): RouteElsewhere {
    return (layer, tokens) => {
      const { share, experts } = this.#layers.get(layer) as Share
      const { sharing, back } = this.ranks
      return routeOverRanks(pass, sharing, share, tokens, experts, { back })
    }
  }

  /** Experts that nobody has chosen have a gradient all the same, as on one rank. */
  completeGradients(): void {
    for (const parameter of this.rows.values())
      if (parameter.trainable) parameter.grad ??= zeros(parameter.shape, { backend: parameter.backend })
  }

  /** Frees this rank's experts; the model stays. */
  dispose(): void {
    for (const own of this.rows.values()) own.dispose()
  }
}

/** The first expert of a rank, and the end. */
const runOf = (experts: number, { rank, size }: Communicator): [number, number] => [
  (rank * experts) / size,
  ((rank + 1) * experts) / size,
]

function shareOf(op: string, whole: SpreadableLayer['experts'], ranks: Communicator): Share {
  const stacked = namedParameters(whole)
  const [experts] = stacked[0].parameter.shape
  if (experts % ranks.size !== 0) {
    const problem = `${experts} experts cannot be shared by ${ranks.size} ranks`
    throw refusal(op, problem, 'use a number of ranks that divides them')
  }
  const share = whole.copyOf(...runOf(experts, ranks))
  const own = namedParameters(share)
  return { share, experts, rows: stacked.map(({ parameter }, i) => [parameter, own[i].parameter] as const) }
}
