/** @file How often a depth's draft is what the main model says itself, measured on given text instead of in decoding. */
import { concat, fromHost, full, noGrad, scope, type Tensor } from '@moe/core'
import { chain, type DepthOptions, onDevice } from './loss.ts'
import type { MtpModule } from './mtp.ts'
import { type DepthTensors, type TokenRows, targetsAt } from './targets.ts'

/** Detached scalars per depth, shallowest first; 0 where a batch has no such position. */
export interface MtpAcceptance {
  /** Share of positions where the likeliest token of the depth is the main model's likeliest token at the same place. */
  readonly alone: readonly Tensor[]
  /** The same for the depth and all shallower ones: the share of drafts that greedy speculative decoding would accept. */
  readonly chained: readonly Tensor[]
}

/** Rows whose logits are there at a time: a vocabulary's are many. */
const PIECE = 256

/** Likeliest token of every row: `x [N, D]`, `weight [V, D]` to `i32 [N]`. */
function likeliest(x: Tensor, weight: Tensor): Tensor {
  const [rows] = x.shape
  const best = (from: number) =>
    scope(() => {
      const piece = x.narrow(0, from, Math.min(rows, from + PIECE))
      return piece.matmul(weight, { transposeB: true }).topk(1).indices.reshape([piece.shape[0]])
    })
  return concat(Array.from({ length: Math.ceil(rows / PIECE) }, (_, i) => best(i * PIECE)))
}

/**
 * Greedy acceptance of every depth on rows of T + 1 + depth tokens, given the main model's hidden states `[B, T, D]` (after its final norm).
 * The drafts follow the true text, not drafted text, so deeper rates lean a little high. One draft of acceptance a makes 1 + a tokens
 * per pass, more make 1 + chained_1 + chained_2 + ...
 */
export function mtpAcceptance<Options>(
  modules: ReadonlyArray<MtpModule<Options>>,
  hidden: Tensor,
  rows: TokenRows | DepthTensors,
  headWeight: Tensor,
  options: DepthOptions<Options>,
): MtpAcceptance {
  return noGrad(() =>
    scope(() => {
      const [batch, time, features] = hidden.shape
      const { backend } = hidden
      const flat = (x: Tensor) => x.reshape([batch * time, features])
      const main = likeliest(flat(hidden.detach()), headWeight.detach()).reshape([batch, time])
      const uploaded = onDevice(rows, hidden, modules.length)
      const states = chain(modules, hidden.detach(), uploaded, options)
      const alone: Tensor[] = []
      const chained: Tensor[] = []
      let agreed = full([batch, time], 1, { backend })
      states.forEach((state, k) => {
        const depth = k + 1
        const weight = (modules[k].ownHead ?? headWeight).detach()
        const draft = likeliest(flat(state), weight).reshape([batch, time])
        // The main model says the token `depth` places later; the last `depth` positions have nobody to ask.
        const says = main.narrow(1, Math.min(depth, time), time).pad([0, 0], [0, Math.min(depth, time)])
        const asked = fromHost(
          Float32Array.from({ length: batch * time }, (_, i) => ((i % time) + depth < time ? 1 : 0)),
          [batch, time],
          'f32',
          backend,
        )
        const counts = asked.sub(asked.mul(targetsAt(uploaded, depth).lt(0).cast('f32').reshape([batch, time])))
        const count = counts.sum().maximum(1)
        const same = draft.eq(says).cast('f32')
        agreed = agreed.mul(same)
        const rate = (hits: Tensor) => hits.mul(counts).sum().div(count)
        alone.push(rate(same))
        chained.push(rate(agreed))
      })
      return { alone, chained }
    }),
  )
}
