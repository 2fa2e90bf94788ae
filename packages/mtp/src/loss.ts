/** @file The training loss over all depths (V3 report eq. 24-25). */
import { checkOptions, linearCrossEntropy, MoeError, needAxes, type Tensor } from '@moe/core'
import type { MtpModule } from './mtp.ts'
import {
  averageAt,
  type DepthTensors,
  depthTargets,
  idsAhead,
  type TokenRows,
  targetsAt,
  uploadTargets,
} from './targets.ts'

/** The loss of all depths, and what each adds to it. */
export interface MtpLoss {
  /** Mean over depths of the mean cross-entropy of each: multiply by λ and add it to the main loss. */
  readonly loss: Tensor
  /** Mean cross-entropy of every depth (scalars, detached). */
  readonly perDepth: readonly Tensor[]
}

/** How far gradients go. */
export interface MtpLossOptions {
  /**
   * Train the modules alone: no gradient reaches the main model, neither through its hidden states nor through the shared embedding and head.
   * For drafting behind a finished model, or beside one whose loss must not change. Default false: trained jointly.
   */
  readonly detached?: boolean
}

/** What blocks are run with: the same at every depth, or by depth (1 for the first), such as a mask of the tokens that lie that far ahead. */
export type DepthOptions<Options> = Options | ((depth: number) => Options)

/** Rows as the losses need them; they may have been uploaded before. */
export function onDevice(rows: TokenRows | DepthTensors, hidden_BTD: Tensor, depths: number): DepthTensors {
  if (!('documents' in rows)) return rows
  return uploadTargets(depthTargets(rows, hidden_BTD.shape[1], depths), rows.rows, hidden_BTD.backend)
}

/** Hidden states of every depth after its norm, `[B, T, D]` each: what its head is applied to. */
export function chain<Options>(
  modules: ReadonlyArray<MtpModule<Options>>,
  hidden_BTD: Tensor,
  rows: DepthTensors,
  options: DepthOptions<Options>,
  { detached = false }: MtpLossOptions = {},
): Tensor[] {
  const time = hidden_BTD.shape[1]
  let hidden = detached ? hidden_BTD.detach() : hidden_BTD
  return modules.map((module, k) => {
    const next = idsAhead(rows, time, k + 1)
    const own = typeof options === 'function' ? (options as (depth: number) => Options)(k + 1) : options
    hidden = module.normalize(module.forward(hidden, next, own, { detached }))
    return hidden
  })
}

/**
 * What one depth predicts (1 for the first module): mean cross-entropy over its positions that carry loss, 0 where there are none.
 * @param hidden_BTD its hidden states after its norm
 */
export function mtpDepthLoss<Options>(
  module: MtpModule<Options>,
  depth: number,
  hidden_BTD: Tensor,
  rows: DepthTensors,
  headWeight: Tensor,
  settings: MtpLossOptions = {},
): Tensor {
  checkOptions('mtpDepthLoss', settings, { detached: true })
  const { detached = false } = settings
  const [batch, time, features] = hidden_BTD.shape
  const weight = module.ownHead ?? (detached ? headWeight.detach() : headWeight)
  const losses = linearCrossEntropy(hidden_BTD.reshape([batch * time, features]), weight, targetsAt(rows, depth))
  return losses.sum().mul(averageAt(rows, depth))
}

/**
 * Runs every depth behind the main model's hidden states `[B, T, D]` (after its final norm). Rows need T + 1 + depth tokens; `DepthTensors` are those of
 * `depthTargets` for as many depths as there are modules. A depth whose batch holds no target gives 0.
 */
export function mtpLoss<Options>(
  modules: ReadonlyArray<MtpModule<Options>>,
  hidden_BTD: Tensor,
  rows: TokenRows | DepthTensors,
  headWeight: Tensor,
  options: DepthOptions<Options>,
  settings: MtpLossOptions = {},
): MtpLoss {
  checkOptions('mtpLoss', settings, { detached: true })
  const { detached = false } = settings
  if (modules.length === 0) {
    throw new MoeError({ code: 'E_ATTR', op: 'mtpLoss', problem: 'there are no modules', fix: 'leave the loss out' })
  }
  needAxes('mtpLoss', hidden_BTD, ['batch', 'time', 'hidden'])
  const uploaded = onDevice(rows, hidden_BTD, modules.length)
  const losses = chain(modules, hidden_BTD, uploaded, options, { detached }).map((hidden, k) =>
    mtpDepthLoss(modules[k], k + 1, hidden, uploaded, headWeight, { detached }),
  )
  const total = losses.reduce((sum, loss) => sum.add(loss))
  return { loss: total.mul(1 / modules.length), perDepth: losses.map(loss => loss.detach()) }
}
