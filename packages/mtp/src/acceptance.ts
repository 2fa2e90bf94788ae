/**
 * @file The acceptance rate of drafts: how often a depth predicts the main model's own token, measured on given text
 * rather than during decoding.
 */
import { concat, fromHost, full, noGrad, scope, type Tensor } from '@moe/core'
import { chain, type DepthOptions, onDevice } from './loss.ts'
import type { MtpModule } from './mtp.ts'
import { type DepthTensors, type TokenRows, targetsAt } from './targets.ts'

/** Detached scalars per depth, shallowest first; 0 if a batch contains no such position. */
export interface MtpAcceptance {
  /** Share of positions at which the most likely token of the depth equals that of the main model. */
  readonly individual: readonly Tensor[]
  /**
   * Share of positions at which this holds for the depth and all shallower ones: the drafts that greedy speculative
   * decoding would accept.
   */
  readonly cumulative: readonly Tensor[]
}

/** Number of rows whose logits are in memory at a time, because each has a whole vocabulary of them. */
const rowsAtOnce = 256

/** Most likely token of every row: `x [N, D]`, `weight [V, D]` to `i32 [N]`. */
function argmax(x: Tensor, weight: Tensor): Tensor {
  const [rows] = x.shape
  const best = (from: number) =>
    scope(() => {
      const piece = x.narrow(0, from, Math.min(rows, from + rowsAtOnce))
      return piece.matmul(weight, { transposeB: true }).topk(1).indices.reshape([piece.shape[0]])
    })
  return concat(Array.from({ length: Math.ceil(rows / rowsAtOnce) }, (_, i) => best(i * rowsAtOnce)))
}

/**
 * Computes the greedy acceptance rate of every depth on rows of T + 1 + depth tokens, given the main model's hidden
 * states `[B, T, D]` after its final norm.
 *
 * The drafts follow the true text instead of drafted text, so the rates of deeper depths are slightly too high. With
 * one draft of acceptance rate a, a pass generates 1 + a tokens; with several, 1 + the sum of `cumulative`.
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
      const main = argmax(flat(hidden.detach()), headWeight.detach()).reshape([batch, time])
      const uploaded = onDevice(rows, hidden, modules.length)
      const states = chain(modules, hidden.detach(), uploaded, options)
      const individual: Tensor[] = []
      const cumulative: Tensor[] = []
      let agreed = full([batch, time], 1, { backend })
      states.forEach((state, k) => {
        const depth = k + 1
        const weight = (modules[k].ownHead ?? headWeight).detach()
        const draft = argmax(flat(state), weight).reshape([batch, time])
        // The main model predicts the same token `depth` positions later. The last `depth` positions have no such
        // prediction.
        const expected = main.narrow(1, Math.min(depth, time), time).pad([0, 0], [0, Math.min(depth, time)])
        const hasPrediction = fromHost(
          Float32Array.from({ length: batch * time }, (_, i) => ((i % time) + depth < time ? 1 : 0)),
          [batch, time],
          'f32',
          backend,
        )
        const counts = hasPrediction.sub(
          hasPrediction.mul(targetsAt(uploaded, depth).lt(0).cast('f32').reshape([batch, time])),
        )
        const count = counts.sum().maximum(1)
        const same = draft.eq(expected).cast('f32')
        agreed = agreed.mul(same)
        const rate = (hits: Tensor) => hits.mul(counts).sum().div(count)
        individual.push(rate(same))
        cumulative.push(rate(agreed))
      })
      return { individual, cumulative }
    }),
  )
}
