/** @file Parameters that several ranks have alike, of which each trains a share for all: "ZeRO", stage 1 (Rajbhandari et al. 2020). */
import { noGrad } from '../context.ts'
import { zeros } from '../create.ts'
import { sizeOf } from '../shape.ts'
import type { Tensor } from '../tensor.ts'
import type { NamedParameter } from './module.ts'
import { Parameter } from './parameter.ts'

/** Rows of a tensor: of its first axis those from number `from` to before `to`. A scalar is one row. */
export interface Rows {
  /** Of which all ranks have one. */
  readonly tensor: Tensor
  /** The first. */
  readonly from: number
  /** Behind the last. */
  readonly to: number
}

/** What ranks need to share parameters out. A `Communicator` of `@moe/parallel` has it. */
export interface SharingRanks {
  /** Number of this rank, from 0. */
  readonly rank: number
  /** Number of ranks. */
  readonly size: number
  /** Of tensors that all ranks have, sums over the ranks: `shares[r]` are the rows whose sums rank r is given, in `into` if there is such. */
  reduceShares(shares: ReadonlyArray<readonly Rows[]>, into?: readonly Tensor[]): Promise<readonly Tensor[]>
  /** Gives all ranks what each has for its rows, `own`: the tensors' elements are replaced. */
  gatherShares(shares: ReadonlyArray<readonly Rows[]>, own: readonly Tensor[]): Promise<void>
}

/** A parameter of a rank, under its name in the model. */
export interface OwnParameter extends NamedParameter {
  /** Where it is a run of rows of the model's parameter, as of a stack of experts: the first of them. Together the ranks have all rows. */
  readonly firstRow?: number
}

/** Whether each of its rows is a token's: embedding tables and heads, by the names that checkpoints have. */
export const isTokenTable = ({ name }: NamedParameter): boolean =>
  /(^|\.)(embed_tokens|lm_head|wte|embedding)\./.test(`${name}.`)

/** Rows of a parameter. */
interface NamedRows {
  readonly named: OwnParameter
  readonly from: number
  readonly to: number
}

/** Elements of a row. */
const widthOf = ({ parameter }: NamedParameter) => sizeOf(parameter.shape.slice(1))

/**
 * Deals parameters out to ranks, in their order: every rank has a run, of about as many elements. Stacks of matrices are cut between matrices, token tables between rows, others not at all, as optimizers may look at whole
 * matrices. No share is larger than the mean by more than the largest piece that is not cut.
 */
export function dealOut(parameters: readonly OwnParameter[], ranks: number): NamedRows[][] {
  const starts = [0]
  for (const { parameter } of parameters) starts.push((starts.at(-1) as number) + parameter.size)
  const total = starts[parameters.length]
  const cuts = Array.from({ length: ranks + 1 }, (_, rank) => {
    const ideal = (rank * total) / ranks
    const at = starts.findIndex((start, i) => ideal <= (starts[i + 1] ?? start))
    const named = parameters.at(at)
    if (named === undefined) return 0
    const width = isCut(named) ? widthOf(named) : named.parameter.size
    return starts[at] + Math.round((ideal - starts[at]) / Math.max(1, width)) * width
  })
  return cuts.slice(1).map((end, rank) =>
    parameters.flatMap((named, i) => {
      const [from, to] = [Math.max(cuts[rank], starts[i]), Math.min(end, starts[i + 1])]
      if (from >= to) return []
      const width = widthOf(named)
      return [{ named, from: (from - starts[i]) / width, to: (to - starts[i]) / width }]
    }),
  )
}

const isCut = (named: NamedParameter) => named.parameter.rank > 2 || (named.parameter.rank === 2 && isTokenTable(named))

/**
 * What one of several ranks trains of parameters that all have alike: it alone keeps the optimizer's state of its share, is given the sums of its gradients, and gives its new weights to the others. All ranks make the same calls in the
 * same order, with gradients of the same parameters.
 *
 * The optimizer is made of `parameters`. A step is `sumGradients`, then `update`.
 */
export class ParameterShare {
  /** Of this rank. Those that are rows of a parameter are freed between updates. */
  readonly parameters: readonly OwnParameter[]
  readonly #ranks: SharingRanks
  readonly #dealt: ReadonlyArray<readonly NamedRows[]>
  /** Parameters that have a gradient in this step, on all ranks. */
  #changing: ReadonlySet<Parameter> = new Set()

  /** @param parameters of the model, or rows of them that these ranks have alike; those that are not trainable are left out */
  constructor(parameters: readonly OwnParameter[], ranks: SharingRanks) {
    this.#ranks = ranks
    this.#dealt = dealOut(
      parameters.filter(({ parameter }) => parameter.trainable),
      ranks.size,
    )
    this.parameters = this.#dealt[ranks.rank].map(own)
  }

  /** Replaces the gradients of this rank's parameters by the sums over the ranks. All others are freed. */
  async sumGradients(): Promise<void> {
    const sums = await this.sums(({ grad }) => grad)
    for (const { named } of this.#dealt.flat()) named.parameter.zeroGrad()
    for (const [i, { parameter }] of this.parameters.entries()) parameter.grad = sums[i]
  }

  /**
   * The same sums, for each of `parameters`; null where there is no gradient.
   * @param gradientOf a parameter of the model
   * @param into where the sums are put: a tensor for each of `parameters` that has a gradient
   */
  async sums(
    gradientOf: (parameter: Parameter) => Tensor | null,
    into?: ReadonlyArray<Tensor | null>,
  ): Promise<Array<Tensor | null>> {
    const gradients = new Map<Parameter, Tensor>()
    for (const { named } of this.#dealt.flat()) {
      const gradient = gradientOf(named.parameter)
      if (gradient !== null) gradients.set(named.parameter, gradient)
    }
    this.#changing = new Set(gradients.keys())
    const shares = this.#rows(parameter => gradients.get(parameter) as Tensor)
    const sums = [
      ...(await this.#ranks.reduceShares(
        shares,
        into?.flatMap(tensor => tensor ?? []),
      )),
    ]
    return this.#dealt[this.#ranks.rank].map(({ named }) =>
      this.#changing.has(named.parameter) ? (sums.shift() as Tensor) : null,
    )
  }

  /** Memory for `sums`: the gradients themselves, and new tensors, which belong to the caller, where this rank has rows of one. */
  places(gradientOf: (parameter: Parameter) => Tensor | null): Array<Tensor | null> {
    return this.#dealt[this.#ranks.rank].map(({ named }, i) => {
      const gradient = gradientOf(named.parameter)
      const { parameter } = this.parameters[i]
      return gradient === null || parameter === named.parameter ? gradient : zeros(parameter.shape, gradient)
    })
  }

  /** Takes the weights of this rank's rows, runs the optimizer's step on `parameters`, and gives all ranks the new weights of all. */
  async update<T>(step: () => T | Promise<T>): Promise<T> {
    try {
      this.takeRows()
      const result = await step()
      await this.gather()
      return result
    } finally {
      this.freeRows()
    }
  }

  /** What `update` does before its step, of all parameters: `gather` then gives all ranks the weights of all, `freeRows` ends it. */
  takeAll(): void {
    this.#changing = new Set(this.#dealt.flat().map(({ named }) => named.parameter))
    this.takeRows()
  }

  /** Gives the parameters that are rows of one their weights. */
  takeRows(): void {
    for (const [i, { named, from, to }] of this.#dealt[this.#ranks.rank].entries()) {
      const { parameter } = this.parameters[i]
      if (parameter !== named.parameter) parameter.assign(noGrad(() => named.parameter.narrow(0, from, to)))
    }
  }

  /** Gives all ranks the weights that each has updated. */
  async gather(): Promise<void> {
    const mine = this.#dealt[this.#ranks.rank]
    const updated = this.parameters.flatMap(({ parameter }, i) =>
      this.#changing.has(mine[i].named.parameter) ? [parameter] : [],
    )
    await this.#ranks.gatherShares(
      this.#rows(parameter => parameter),
      updated,
    )
    for (const parameter of this.#changing) parameter.version++
  }

  /** Frees the parameters that are rows of one. */
  freeRows(): void {
    for (const [i, { named }] of this.#dealt[this.#ranks.rank].entries()) {
      const { parameter } = this.parameters[i]
      if (parameter !== named.parameter) parameter.dispose()
    }
  }

  /** Every rank's rows of what changes in this step. */
  #rows(tensorOf: (parameter: Parameter) => Tensor): Rows[][] {
    return this.#dealt.map(share =>
      share.flatMap(({ named: { parameter }, from, to }) =>
        this.#changing.has(parameter) ? [{ tensor: tensorOf(parameter), from, to }] : [],
      ),
    )
  }
}

/** The model's parameter, or rows of it, which have no weights yet. */
function own({ named, from, to }: NamedRows): OwnParameter {
  const { parameter, slices, firstRow = 0 } = named
  if (to - from === (parameter.shape[0] ?? 1)) return named
  const rows = new Parameter(noGrad(() => parameter.narrow(0, from, to)))
  rows.dispose()
  return { ...named, parameter: rows, firstRow: firstRow + from, ...(slices && { slices: slices.slice(from, to) }) }
}
