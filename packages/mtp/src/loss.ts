/** @file The training loss over all depths (V3 report eq. 24-25). */
import { type Backend, fromHost, linearCrossEntropy, type Parameter, type Tensor } from '@moe/core'
import type { MtpModule } from './mtp.ts'
import { shiftTokens, type TokenRows } from './targets.ts'

export interface MtpLoss {
  /** Mean over depths of the mean cross-entropy of each: multiply by λ and add it to the main loss. */
  readonly loss: Tensor
  /** Mean cross-entropy of every depth (scalars, detached). */
  readonly perDepth: readonly Tensor[]
}

/**
 * Runs every depth behind the main model's hidden states `[B, T, D]` (after its final norm). Rows need T + 1 + depth tokens.
 * A depth whose batch holds no target gives 0.
 */
export function mtpLoss<Options>(
  modules: ReadonlyArray<MtpModule<Options>>,
  hidden_BTD: Tensor,
  rows: TokenRows,
  headWeight: Parameter,
  options: Options,
): MtpLoss {
  const [batch, time, features] = hidden_BTD.shape
  const { backend } = hidden_BTD
  let hidden = hidden_BTD
  const losses = modules.map((module, k) => {
    const next = shiftTokens(rows, time, k + 1)
    hidden = module.normalize(module.forward(hidden, upload(next.ids, [batch, time], backend), options))
    const { targets, count } = shiftTokens(rows, time, k + 2)
    const flat = hidden.reshape([batch * time, features])
    return linearCrossEntropy(flat, headWeight, upload(targets, [batch * time], backend))
      .sum()
      .mul(1 / Math.max(1, count))
  })
  const total = losses.reduce((sum, loss) => sum.add(loss))
  return { loss: total.mul(1 / modules.length), perDepth: losses.map(loss => loss.detach()) }
}

const upload = (ids: Int32Array, shape: number[], backend: Backend) => fromHost(ids, shape, 'i32', backend)
