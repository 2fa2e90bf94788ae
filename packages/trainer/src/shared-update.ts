/** @file An optimizer that ranks with the same model share out: each keeps the state of its part, and updates that. */
import { MoeError, type NamedParameter, ParameterShare } from '@moe/core'
import type { Optimizer } from './optim/optimizer.ts'
import { canShare, gatherNumbers, type OptimizerRanks, type Ranks } from './ranks.ts'

/** Who takes part, and with what. */
export interface SharedUpdate {
  readonly ranks: OptimizerRanks
  readonly share: ParameterShare
}

/** What the options of a step say of both. @throws MoeError E_CONFIG for a share among no ranks, or among ranks that cannot share */
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
    problem: 'there is a share of the parameters without the ranks that it is shared with',
    fix: 'pass { ranks, share } with the ranks that the share was made with',
  })
}

/**
 * The optimizer of this rank's share of the parameters. Of all of them, and no share, where this is one rank alone, ranks that cannot share anything, or an optimizer that does not say whose state it has: no checkpoint could be put together
 * from its parts.
 */
export async function shareOptimizer(
  ranks: Ranks | undefined,
  parameters: readonly NamedParameter[],
  make: (parameters: readonly NamedParameter[]) => Optimizer,
): Promise<{ readonly optimizer: Optimizer; readonly shared?: SharedUpdate }> {
  if (ranks === undefined || ranks.size === 1 || !canShare(ranks)) return { optimizer: make(parameters) }
  const share = new ParameterShare(parameters, ranks)
  const optimizer = make(share.parameters)
  // A rank that has nothing cannot tell.
  const says = optimizer.entries().every(({ parameter }) => parameter !== undefined)
  const told = await gatherNumbers(ranks, [Number(says)], parameters[0].parameter).catch(error => {
    optimizer.dispose()
    throw error
  })
  if (told.every(([says]) => says === 1)) return { optimizer, shared: { ranks, share } }
  optimizer.dispose()
  return { optimizer: make(parameters) }
}
