/** @file Replicated parameters in training: gradients are summed over the replicas, and each rank may train a shard of the parameters for all (ZeRO-1). */
import { type LocalParameter, type NamedParameter, type Parameter, ParameterShard, reduceGradients } from '@moe/core'
import type { Communicator } from './communicator/communicator.ts'

/** Parameters that are replicated on the same ranks. */
export interface Replicas {
  readonly parameters: readonly LocalParameter[]
  /** The ranks that hold them, including this one; null if no other rank does. */
  readonly ranks: Communicator | null
}

/** All parameters that a rank trains. */
export class Replicated {
  readonly #groups: ReadonlyArray<Replicas & { shard: ParameterShard | null }>
  /** Whether the optimizer may have stepped since the weights were last exchanged. */
  #stepped = false

  constructor(groups: readonly Replicas[]) {
    this.#groups = groups.map(group => ({ ...group, shard: null }))
  }

  /** From now on each rank trains a shard of the replicated parameters. @returns the parameters that this rank trains, and the frozen ones */
  shard(): LocalParameter[] {
    return this.#groups.flatMap(group => {
      const { parameters, ranks } = group
      if (ranks === null) return parameters
      group.shard ??= new ParameterShard(parameters, ranks)
      return [...group.shard.parameters, ...parameters.filter(({ parameter }) => !parameter.trainable)]
    })
  }

  zeroGradients(): void {
    for (const { parameter } of this.#groups.flatMap(({ parameters }) => parameters)) parameter.zeroGrad()
  }

  /** Sums the gradients of the parameters that this rank trains over their replicas. */
  async sumGradients(): Promise<void> {
    for (const { parameters, ranks, shard } of this.#groups) {
      if (shard !== null) {
        await shard.sumGradients()
        shard.takeRows()
      } else if (ranks !== null) {
        await reduceGradients(trainedOf(parameters), gradients => ranks.allReduce(gradients))
      }
    }
    this.#stepped = true
  }

  /** The parameters whose gradients this rank adds to the norm, such that each gradient counts once over all ranks. */
  counted(): Parameter[] {
    return this.#groups.flatMap(({ parameters, ranks, shard }) => {
      if (shard === null && ranks !== null && ranks.rank !== 0) return []
      return trainedOf(shard?.parameters ?? parameters)
    })
  }

  /** Takes this rank's shard from gathered weights, as after a step, so that the next `gather` sends it to the other ranks. */
  takeBack(): void {
    if (this.#stepped) return
    this.#stepped = true
    for (const { shard } of this.#groups) shard?.takeAll()
  }

  /** Sends each rank the weights that the other ranks' optimizers have updated. */
  async gather(): Promise<void> {
    if (!this.#stepped) return
    this.#stepped = false
    for (const { shard } of this.#groups) {
      await shard?.gather()
      shard?.freeRows()
    }
  }

  dispose(): void {
    for (const { shard } of this.#groups) shard?.freeRows()
  }
}

const trainedOf = (parameters: readonly NamedParameter[]) =>
  parameters.map(({ parameter }) => parameter).filter(({ trainable }) => trainable)
