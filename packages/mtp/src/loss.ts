/** @file The training loss over all depths (V3 report eq. 24-25). */
import { linearCrossEntropy, MoeError, type Tensor } from '@moe/core'
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

const optionsAt = <Options>(options: DepthOptions<Options>, depth: number): Options =>
  typeof options === 'function' ? (options as (depth: number) => Options)(depth) : options

/** Rows as the losses need them; they may have been uploaded before. */
export function onDevice(rows: TokenRows | DepthTensors, hidden_BTD: Tensor, depths: number): DepthTensors {
  if (!('documents' in rows)) return rows
  return uploadTargets(depthTargets(rows, hidden_BTD.shape[1], depths), rows.rows, hidden_BTD.backend)
}

/** Hidden states of a depth after its norm, from those of the depth before. */
function deepen<Options>(
  module: MtpModule<Options>,
  depth: number,
  before_BTD: Tensor,
  rows: DepthTensors,
  options: Options,
  detached: boolean,
): Tensor {
  const next = idsAhead(rows, before_BTD.shape[1], depth)
  const from = detached && depth === 1 ? before_BTD.detach() : before_BTD
  return module.normalize(module.forward(from, next, options, { detached }))
}

/** Hidden states of every depth after its norm, `[B, T, D]` each: what its head is applied to. */
export function chain<Options>(
  modules: ReadonlyArray<MtpModule<Options>>,
  hidden_BTD: Tensor,
  rows: DepthTensors,
  options: DepthOptions<Options>,
): Tensor[] {
  let hidden = hidden_BTD
  return modules.map((module, k) => {
    hidden = deepen(module, k + 1, hidden, rows, optionsAt(options, k + 1), false)
    return hidden
  })
}

/**
 * One depth of `mtpLoss`, for models whose depths lie apart (stages of a pipeline).
 * @param depth 1 for the first module
 * @param before_BTD what the head saw at the depth before: the main model's hidden states after its final norm, or `hidden` of a module
 * @returns `hidden [B, T, D]` for the next depth, and the mean cross-entropy of this one
 */
export function mtpDepth<Options>(
  module: MtpModule<Options>,
  depth: number,
  before_BTD: Tensor,
  rows: DepthTensors,
  headWeight: Tensor,
  options: Options,
  { detached = false }: MtpLossOptions = {},
): { hidden: Tensor; loss: Tensor } {
  const hidden = deepen(module, depth, before_BTD, rows, options, detached)
  const [batch, time, features] = hidden.shape
  const weight = module.ownHead ?? (detached ? headWeight.detach() : headWeight)
  const losses = linearCrossEntropy(hidden.reshape([batch * time, features]), weight, targetsAt(rows, depth))
  return { hidden, loss: losses.sum().mul(averageAt(rows, depth)) }
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
  { detached = false }: MtpLossOptions = {},
): MtpLoss {
  if (modules.length === 0) {
    throw new MoeError({ code: 'E_ATTR', op: 'mtpLoss', problem: 'there are no modules', fix: 'leave the loss out' })
  }
  const uploaded = onDevice(rows, hidden_BTD, modules.length)
  let before = hidden_BTD
  const losses = modules.map((module, k) => {
    const { hidden, loss } = mtpDepth(module, k + 1, before, uploaded, headWeight, optionsAt(options, k + 1), {
      detached,
    })
    before = hidden
    return loss
  })
  const total = losses.reduce((sum, loss) => sum.add(loss))
  return { loss: total.mul(1 / modules.length), perDepth: losses.map(loss => loss.detach()) }
}
