/** @file For tests: passes in pieces on one rank, which has all experts. */
import { dispatchPlan } from '@moe/core'
import type { DeepSeek, PieceRunner, RouteTokens } from './index.ts'

/** Runs each piece as if there were none. */
export const together: PieceRunner = {
  piece: (inputs, fn) => [...fn(...inputs)],
  run: fn => fn(),
  release: () => undefined,
}

/** Routes to the experts of the model. Calls `onLayer` with the number of each layer. */
export function routeWithin(model: DeepSeek, onLayer?: (layer: number) => void): RouteTokens {
  return async (layer, { x, weights, indices }) => {
    onLayer?.(layer)
    const plan = dispatchPlan(indices, model.config.n_routed_experts as number)
    return model.moeLayers[layer].experts.route(x, weights, plan)
  }
}
