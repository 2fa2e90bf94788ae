/** @file A sharded optimizer: each rank of a replicated model keeps the state of its share and updates that. */
import { MoeError, type NamedParameter, ParameterShare } from '@moe/core'
import type { Optimizer } from './optim/optimizer.ts'
import { canShare, gatherNumbers, type OptimizerRanks, type Ranks } from './ranks.ts'

/**  */
export interface SharedUpdate {
  readonly ranks: OptimizerRanks
  readonly share: ParameterShare
}

/**
 * Combines the `ranks` and `share` options of a step. @throws MoeError E_CONFIG if `share` is given without ranks that
 * can share
 */
export function sharedAmong(
  op: string,
  ranks: Ranks | undefined,
  share: ParameterShare | undefined,
): SharedUpdate | undefined {
  if (share === undefined) return undefined
  if (ranks !== undefined && canShare(ranks)) return { ranks, share }
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: 'share is given without ranks that can share',
    fix: 'pass { ranks, share } with the ranks that the share was created with',
  })
}

/**
 * Creates an optimizer for this rank's share of the parameters. The optimizer is not sharded on a single rank, among
 * ranks that cannot share, or if it does not say which parameter its state belongs to (a checkpoint could not be
 * assembled from the parts).
 */
export async function shareOptimizer(
  ranks: Ranks | undefined,
  parameters: readonly NamedParameter[],
  make: (parameters: readonly NamedParameter[]) => Optimizer,
): Promise<{ readonly optimizer: Optimizer; readonly shared?: SharedUpdate }> {
  if (ranks === undefined || ranks.size === 1 || !canShare(ranks)) return { optimizer: make(parameters) }
  const share = new ParameterShare(parameters, ranks)
  const optimizer = make(share.parameters)
  // A rank whose share is empty cannot tell, so all ranks must agree.
  const isShardable = optimizer.entries().every(({ parameter }) => parameter !== undefined)
  const all = await gatherNumbers(ranks, [Number(isShardable)], parameters[0].parameter).catch(error => {
    optimizer.dispose()
    throw error
  })
  if (all.every(([shardable]) => shardable === 1)) return { optimizer, shared: { ranks, share } }
  optimizer.dispose()
  return { optimizer: make(parameters) }
}
