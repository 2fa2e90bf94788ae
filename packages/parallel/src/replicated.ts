/** @file Parameters that several ranks have alike, in training: their gradients are one sum, and each rank may train a share of them for all. */
import { type NamedParameter, type OwnParameter, type Parameter, ParameterShare, reduceGradients } from '@moe/core'
import type { Communicator } from './communicator/communicator.ts'

/** What the same ranks have. */
export interface Replicas {
  readonly parameters: readonly OwnParameter[]
  /** Those that have it, this one among them; null where no other has. */
  readonly ranks: Communicator | null
}

/** All that a rank trains. */
export class Replicated {
  readonly #groups: ReadonlyArray<Replicas & { share: ParameterShare | null }>
  /** Whether the optimizer may have stepped since weights were last exchanged. */
  #stepped = false

  constructor(groups: readonly Replicas[]) {
    this.#groups = groups.map(group => ({ ...group, share: null }))
  }

  /** From here on each rank trains a share of what several have. @returns what this one trains, and what nobody does */
  shareOut(): OwnParameter[] {
    return this.#groups.flatMap(group => {
      const { parameters, ranks } = group
      if (ranks === null) return parameters
      group.share ??= new ParameterShare(parameters, ranks)
      return [...group.share.parameters, ...parameters.filter(({ parameter }) => !parameter.trainable)]
    })
  }

  /** Drops the gradients of before. */
  zeroGradients(): void {
    for (const { parameter } of this.#groups.flatMap(({ parameters }) => parameters)) parameter.zeroGrad()
  }

  /** Makes gradients the sums over all ranks that have the parameters: of those that this rank trains. */
  async sumGradients(): Promise<void> {
    for (const { parameters, ranks, share } of this.#groups) {
      if (share !== null) {
        await share.sumGradients()
        share.takeRows()
      } else if (ranks !== null) {
        await reduceGradients(trainedOf(parameters), gradients => ranks.allReduce(gradients))
      }
    }
    this.#stepped = true
  }

  /** What this rank trains, or the first of those that have it: each gradient is in the norm once. */
  counted(of: (named: NamedParameter) => boolean = () => true): Parameter[] {
    return this.#groups.flatMap(({ parameters, ranks, share }) => {
      if (share === null && ranks !== null && ranks.rank !== 0) return []
      return trainedOf((share?.parameters ?? parameters).filter(of))
    })
  }

  /** Has what this rank trains of gathered weights, as after a step: others are given it by `gather`. */
  takeBack(): void {
    if (this.#stepped) return
    this.#stepped = true
    for (const { share } of this.#groups) share?.takeAll()
  }

  /** Gives all ranks the weights that the optimizers of others have changed. */
  async gather(): Promise<void> {
    if (!this.#stepped) return
    this.#stepped = false
    for (const { share } of this.#groups) {
      await share?.gather()
      share?.freeRows()
    }
  }

  dispose(): void {
    for (const { share } of this.#groups) share?.freeRows()
  }
}

const trainedOf = (parameters: readonly NamedParameter[]) =>
  parameters.map(({ parameter }) => parameter).filter(({ trainable }) => trainable)
