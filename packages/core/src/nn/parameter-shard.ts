/**
 * @file Optimizer state sharding: parameters that are replicated on several ranks, each of which updates a shard
 * ("ZeRO" stage 1, Rajbhandari et al. 2020).
 */
import { zeros } from '../create.ts'
import { Parameter } from '../parameter.ts'
import { sizeOf } from '../shape.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import type { NamedParameter } from './module.ts'

/** A range of rows of a tensor: entries `from` to `to - 1` of its first axis. A scalar has one row. */
export interface Rows {
  /** A tensor that every rank has a copy of. */
  readonly tensor: Tensor
  /** The first row. */
  readonly from: number
  /** The row after the last one. */
  readonly to: number
}

/** The communication that `ParameterShard` needs. A `Communicator` of `@moe/parallel` implements it. */
export interface ShardCommunicator {
  /** Number of this rank, from 0. */
  readonly rank: number
  /** Number of ranks. */
  readonly size: number
  /**
   * Reduce-scatter: sums tensors that all ranks have, and returns to rank r the sums of the rows in `shards[r]`. If
   * `into` is given, the sums are written to those tensors.
   */
  reduceScatterRows(shards: ReadonlyArray<readonly Rows[]>, into?: readonly Tensor[]): Promise<readonly Tensor[]>
  /**
   * All-gather: sends `own`, this rank's rows, to all ranks, and replaces the elements of the tensors by what each rank
   * sent.
   */
  allGatherRows(shards: ReadonlyArray<readonly Rows[]>, own: readonly Tensor[]): Promise<void>
}

/** A parameter that a rank owns, under its name in the model. */
export interface LocalParameter extends NamedParameter {
  /**
   * If it is a range of rows of the model's parameter, for example of stacked experts: the first row. Together, the
   * ranks own all rows.
   */
  readonly firstRow?: number
}

/**
 * Returns whether each row belongs to a token, as in embedding tables and output heads, judging by the usual checkpoint
 * names.
 */
export const isTokenTable = ({ name }: NamedParameter): boolean =>
  /(^|\.)(embed_tokens|lm_head|wte|embedding)\./.test(`${name}.`)

/** A range of rows of a parameter. */
interface NamedRows {
  readonly named: LocalParameter
  readonly from: number
  readonly to: number
}

/** Elements per row. */
const widthOf = ({ parameter }: NamedParameter) => sizeOf(parameter.shape.slice(1))

/**
 * Partitions parameters over ranks in order, so that every rank gets a contiguous range with about the same number of
 * elements. Stacked matrices are split between matrices and token tables between rows. Other parameters are not split,
 * because optimizers may need whole matrices. No shard exceeds the mean by more than the largest unsplit piece.
 */
export function partition(parameters: readonly LocalParameter[], ranks: number): NamedRows[][] {
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
 * The shard of replicated parameters that one rank updates. Each rank keeps optimizer state only for its shard,
 * receives the summed gradients of the shard, and sends the updated weights to the others. All ranks must make the same
 * calls in the same order, with gradients of the same parameters.
 *
 * Create the optimizer for `parameters`. A step is `sumGradients`, then `update`.
 */
export class ParameterShard {
  /** The parameters of this rank's shard. Those that are row ranges of a parameter are freed between updates. */
  readonly parameters: readonly LocalParameter[]
  readonly #ranks: ShardCommunicator
  readonly #shards: ReadonlyArray<readonly NamedRows[]>
  /** Parameters that have a gradient in this step, on all ranks. */
  #changing: ReadonlySet<Parameter> = new Set()

  /**
   * @param parameters of the model, or row ranges of them, that all these ranks have; those that are not trainable are
   * left out
   */
  constructor(parameters: readonly LocalParameter[], ranks: ShardCommunicator) {
    this.#ranks = ranks
    this.#shards = partition(
      parameters.filter(({ parameter }) => parameter.trainable),
      ranks.size,
    )
    this.parameters = this.#shards[ranks.rank].map(own)
  }

  /** Replaces the gradients of this rank's parameters by the sums over the ranks, and frees all others. */
  async sumGradients(): Promise<void> {
    const sums = await this.sums(({ grad }) => grad)
    for (const { named } of this.#shards.flat()) named.parameter.zeroGrad()
    for (const [i, { parameter }] of this.parameters.entries()) parameter.grad = sums[i]
  }

  /**
   * Returns the summed gradient for each of `parameters`, or null if it has none.
   * @param gradientOf returns the gradient of a parameter of the model
   * @param into tensors to write the sums to, one for each of `parameters` that has a gradient
   */
  async sums(
    gradientOf: (parameter: Parameter) => Tensor | null,
    into?: ReadonlyArray<Tensor | null>,
  ): Promise<Array<Tensor | null>> {
    const gradients = new Map<Parameter, Tensor>()
    for (const { named } of this.#shards.flat()) {
      const gradient = gradientOf(named.parameter)
      if (gradient !== null) gradients.set(named.parameter, gradient)
    }
    this.#changing = new Set(gradients.keys())
    const shards = this.#rows(parameter => gradients.get(parameter) as Tensor)
    const sums = [
      ...(await this.#ranks.reduceScatterRows(
        shards,
        into?.flatMap(tensor => tensor ?? []),
      )),
    ]
    return this.#shards[this.#ranks.rank].map(({ named }) =>
      this.#changing.has(named.parameter) ? (sums.shift() as Tensor) : null,
    )
  }

  /**
   * Returns memory for `sums`: the gradients themselves, or, for parameters of which this rank has only some rows, new
   * tensors that belong to the caller.
   */
  places(gradientOf: (parameter: Parameter) => Tensor | null): Array<Tensor | null> {
    return this.#shards[this.#ranks.rank].map(({ named }, i) => {
      const gradient = gradientOf(named.parameter)
      const { parameter } = this.parameters[i]
      return gradient === null || parameter === named.parameter ? gradient : zeros(parameter.shape, gradient)
    })
  }

  /**
   * Copies the current weights into this rank's row ranges, runs the optimizer step on `parameters`, and sends the new
   * weights to all ranks.
   */
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

  /**
   * Does what `update` does before its step, for all parameters. Afterwards, `gather` sends the weights of all
   * parameters to all ranks, and `freeRows` ends the update.
   */
  takeAll(): void {
    this.#changing = new Set(this.#shards.flat().map(({ named }) => named.parameter))
    this.takeRows()
  }

  /** Copies the current weights into the parameters that are row ranges. */
  takeRows(): void {
    for (const [i, { named, from, to }] of this.#shards[this.#ranks.rank].entries()) {
      const { parameter } = this.parameters[i]
      if (parameter !== named.parameter) parameter.assign(noGrad(() => named.parameter.narrow(0, from, to)))
    }
  }

  /** Sends the weights that each rank has updated to all ranks. */
  async gather(): Promise<void> {
    const mine = this.#shards[this.#ranks.rank]
    const updated = this.parameters.flatMap(({ parameter }, i) =>
      this.#changing.has(mine[i].named.parameter) ? [parameter] : [],
    )
    await this.#ranks.allGatherRows(
      this.#rows(parameter => parameter),
      updated,
    )
    for (const parameter of this.#changing) parameter.version++
  }

  /** Frees the parameters that are row ranges. */
  freeRows(): void {
    for (const [i, { named }] of this.#shards[this.#ranks.rank].entries()) {
      const { parameter } = this.parameters[i]
      if (parameter !== named.parameter) parameter.dispose()
    }
  }

  /** Every rank's rows of the parameters that change in this step. */
  #rows(tensorOf: (parameter: Parameter) => Tensor): Rows[][] {
    return this.#shards.map(shard =>
      shard.flatMap(({ named: { parameter }, from, to }) =>
        this.#changing.has(parameter) ? [{ tensor: tensorOf(parameter), from, to }] : [],
      ),
    )
  }
}

/** Returns the model's parameter itself, or a range of its rows, which has no memory yet. */
function own({ named, from, to }: NamedRows): LocalParameter {
  const { parameter, slices, firstRow = 0 } = named
  if (to - from === (parameter.shape[0] ?? 1)) return named
  const rows = Parameter.withoutMemory([to - from, ...parameter.shape.slice(1)], parameter)
  return { ...named, parameter: rows, firstRow: firstRow + from, ...(slices && { slices: slices.slice(from, to) }) }
}
