/** @file A sharded optimizer: each rank of a replicated model keeps the state of its shard and updates that. */
import { MoeError, type NamedParameter, ParameterShard } from '@moe/core'
import type { Optimizer } from './optim/optimizer.ts'
import { canShard, gatherNumbers, type OptimizerRanks, type Ranks } from './ranks.ts'

/**  */
export interface ShardedUpdate {
  readonly ranks: OptimizerRanks
  readonly shard: ParameterShard
}

/**
 * Combines the `ranks` and `shard` options of a step. @throws MoeError E_CONFIG if `shard` is given without ranks that
 * can share
 */
export function shardedAmong(
  op: string,
  ranks: Ranks | undefined,
  shard: ParameterShard | undefined,
): ShardedUpdate | undefined {
  if (shard === undefined) return undefined
  if (ranks !== undefined && canShard(ranks)) return { ranks, shard }
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: 'shard is given without ranks that can shard the optimizer',
    fix: 'pass { ranks, shard } with the communicator that the shard was created with',
  })
}

/**
 * Creates an optimizer for this rank's shard of the parameters. The optimizer is not sharded on a single rank, among
 * ranks that cannot share, or if it does not say which parameter its state belongs to (a checkpoint could not be
 * assembled from the parts).
 */
export async function shardOptimizer(
  ranks: Ranks | undefined,
  parameters: readonly NamedParameter[],
  make: (parameters: readonly NamedParameter[]) => Optimizer,
): Promise<{ readonly optimizer: Optimizer; readonly sharded?: ShardedUpdate }> {
  if (ranks === undefined || ranks.size === 1 || !canShard(ranks)) return { optimizer: make(parameters) }
  const shard = new ParameterShard(parameters, ranks)
  const optimizer = make(shard.parameters)
  // A rank whose shard is empty cannot tell, so all ranks must agree.
  const isShardable = optimizer.entries().every(({ parameter }) => parameter !== undefined)
  const all = await gatherNumbers(ranks, [Number(isShardable)], parameters[0].parameter).catch(error => {
    optimizer.dispose()
    throw error
  })
  if (all.every(([shardable]) => shardable === 1)) return { optimizer, sharded: { ranks, shard } }
  optimizer.dispose()
  return { optimizer: make(parameters) }
}
