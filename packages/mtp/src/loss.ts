/** @file The training loss over all depths (V3 report eq. 24-25). */
import { checkOptions, linearCrossEntropy, MoeError, needAxes, type Tensor } from '@moe/core'
import type { MtpModule } from './mtp.ts'
import {
  type DepthTensors,
  depthTargets,
  idsAhead,
  inverseCountAt,
  type TokenRows,
  targetsAt,
  uploadTargets,
} from './targets.ts'

/** The loss over all depths, and the loss of each. */
export interface MtpLoss {
  /** Mean over depths of the mean cross-entropy of each. Multiply it by λ and add it to the main loss. */
  readonly loss: Tensor
  /** Mean cross-entropy of each depth, as detached scalars. */
  readonly perDepth: readonly Tensor[]
}

/** Options of the losses: where gradients flow. */
export interface MtpLossOptions {
  /**
   * Trains only the modules: no gradient reaches the main model, neither through its hidden states nor through the
   * shared embedding and head. Use it to add drafting to a finished model, or if the main loss must not change. Default
   * false: joint training.
   */
  readonly detached?: boolean | undefined
}

/**
 * Options for the blocks: the same at every depth, or a function of the depth (1 for the first), for example a mask of
 * the tokens that many places ahead.
 */
export type DepthOptions<Options> = Options | ((depth: number) => Options)

/** Returns the rows as tensors for the losses. They may have been uploaded before. */
export function onDevice(rows: TokenRows | DepthTensors, hidden_BTD: Tensor, depths: number): DepthTensors {
  if (!('documents' in rows)) return rows
  return uploadTargets(depthTargets(rows, hidden_BTD.shape[1], depths), rows.rows, hidden_BTD.backend)
}

/** Returns the hidden states of every depth after its norm, `[B, T, D]` each: the input of its head. */
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
 * Returns the loss of one depth (1 for the first module): the mean cross-entropy over its positions with a target, or 0
 * if there are none.
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
  return losses.sum().mul(inverseCountAt(rows, depth))
}

/**
 * Runs all depths on the main model's hidden states `[B, T, D]` (after its final norm) and returns their loss. Rows
 * need T + 1 + depth tokens; `DepthTensors` must come from `depthTargets` for as many depths as there are modules. A
 * depth without targets in the batch has loss 0.
 * @throws MoeError E_ATTR if there are no modules, E_SHAPE
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
    throw new MoeError({
      code: 'E_ATTR',
      op: 'mtpLoss',
      problem: 'the list of modules is empty',
      fix: 'pass at least one module, or omit the loss',
    })
  }
  needAxes('mtpLoss', hidden_BTD, ['batch', 'time', 'hidden'])
  const uploaded = onDevice(rows, hidden_BTD, modules.length)
  const losses = chain(modules, hidden_BTD, uploaded, options, { detached }).map((hidden, k) =>
    mtpDepthLoss(modules[k], k + 1, hidden, uploaded, headWeight, { detached }),
  )
  const total = losses.reduce((sum, loss) => sum.add(loss))
  return { loss: total.mul(1 / modules.length), perDepth: losses.map(loss => loss.detach()) }
}
