/** @file The training loss over all depths (V3 report eq. 24-25). */
import { type Backend, fromHost, linearCrossEntropy, type Tensor } from '@moe/core'
import type { MtpModule } from './mtp.ts'
import { shiftTokens, type TokenRows } from './targets.ts'

export interface MtpLoss {
  /** Mean over depths of the mean cross-entropy of each: multiply by λ and add it to the main loss. */
  readonly loss: Tensor
  /** Mean cross-entropy of every depth (scalars, detached). */
  readonly perDepth: readonly Tensor[]
}

export interface MtpLossOptions {
  /**
   * Train the modules alone: no gradient reaches the main model, neither through its hidden states nor through the shared embedding and head.
   * For drafting behind a finished model, or beside one whose loss must not change. Default false: trained jointly.
   */
  readonly detached?: boolean
}

/** What blocks are run with: the same at every depth, or by depth (1 for the first), such as a mask of the tokens that lie that far ahead. */
export type DepthOptions<Options> = Options | ((depth: number) => Options)

/** Hidden states of every depth after its norm, `[B, T, D]` each: what its head is applied to. Rows need T + 1 + depth tokens. */
export function chain<Options>(
  modules: ReadonlyArray<MtpModule<Options>>,
  hidden_BTD: Tensor,
  rows: TokenRows,
  options: DepthOptions<Options>,
  { detached = false }: MtpLossOptions = {},
): Tensor[] {
  const [batch, time] = hidden_BTD.shape
  let hidden = detached ? hidden_BTD.detach() : hidden_BTD
  return modules.map((module, k) => {
    const { ids } = shiftTokens(rows, time, k + 1)
    const next = upload(ids, [batch, time], hidden_BTD.backend)
    const own = typeof options === 'function' ? (options as (depth: number) => Options)(k + 1) : options
    hidden = module.normalize(module.forward(hidden, next, own, { detached }))
    return hidden
  })
}

/**
 * Runs every depth behind the main model's hidden states `[B, T, D]` (after its final norm). Rows need T + 1 + depth tokens.
 * A depth whose batch holds no target gives 0.
 */
export function mtpLoss<Options>(
  modules: ReadonlyArray<MtpModule<Options>>,
  hidden_BTD: Tensor,
  rows: TokenRows,
  headWeight: Tensor,
  options: DepthOptions<Options>,
  { detached = false }: MtpLossOptions = {},
): MtpLoss {
  const [batch, time, features] = hidden_BTD.shape
  const { backend } = hidden_BTD
  const losses = chain(modules, hidden_BTD, rows, options, { detached }).map((hidden, k) => {
    const { targets, count } = shiftTokens(rows, time, k + 2)
    const flat = hidden.reshape([batch * time, features])
    const shared = detached ? headWeight.detach() : headWeight
    return linearCrossEntropy(flat, modules[k].ownHead ?? shared, upload(targets, [batch * time], backend))
      .sum()
      .mul(1 / Math.max(1, count))
  })
  const total = losses.reduce((sum, loss) => sum.add(loss))
  return { loss: total.mul(1 / modules.length), perDepth: losses.map(loss => loss.detach()) }
}

const upload = (ids: Int32Array, shape: number[], backend: Backend) => fromHost(ids, shape, 'i32', backend)
