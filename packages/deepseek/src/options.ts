/** @file How a model starts, how it is balanced and what its loss is made of. */
import type { FolderOptions } from '@moe/checkpoint'
import { type Backend, MoeError, type OptionNames, shown, type WeightFormat } from '@moe/core'
import type { Balancer, LoadMonitor, Scheduled, TokenDropping } from '@moe/router'
import type { DenseConfigInput, LatentConfigInput } from './config.ts'

/**
 * What the training loss adds to the next-token loss, and how fast the balance bias moves. Numbers, or functions of the optimizer steps done (`model.step`);
 * may be changed between steps.
 */
export interface Objective {
  /** λ of multi-token prediction (V3: 0.3, later 0.1). */
  mtpWeight: Scheduled
  /** α of the sequence-wise balance loss (V3: 1e-4). Not used with a balancer. */
  balanceWeight: Scheduled
  /** γ of the selection bias (V3: 0.001). Not used with a balancer. */
  biasSpeed: Scheduled
  /** Train the MTP modules alone: they give no gradient to the main model. Default false. */
  mtpDetached: boolean
  /** Log the share of drafts that the main model would accept at every depth with each training loss. It costs the logits of all depths. Default false. */
  mtpAcceptance: boolean
}

/**
 * What a training step computes again on its way back, in place of keeping it from its way forward: time for memory. Losses and gradients stay the same, bit for bit.
 * `'selective'`: norms, queries, keys and values made from the latents, gated activations (DeepSeek-V3 report 3.2.3 and 3.3.3), and tokens in the order of their experts. `'layers'`: every layer but for
 * its input. `{ every: n }`: every n-th layer so. Layers of MTP modules count.
 */
export type Recompute = 'selective' | 'layers' | { readonly every: number }

/** How a model starts, how it is balanced and what its loss is made of. */
export interface DeepSeekOptions {
  /** Of the random weights. Null for a model of zeros, quickly made, that `loadWeights` will fill. Default 0. */
  readonly seed?: number | null
  /** Where weights live. Default: that of `setDefaultBackend`. */
  readonly backend?: Backend
  /** Store weights in fewer bits, for inference: see `quantizeWeights`. Checkpoints are quantized tensor by tensor as they are read. Default: f32. */
  readonly weights?: WeightFormat
  /** In place of the usual: mtpWeight 0.3, balanceWeight 1e-4, biasSpeed 0.001, joint training of the MTP modules. */
  readonly objective?: Partial<Objective>
  /** What keeps the experts evenly loaded, in place of `balanceWeight` and `biasSpeed`. */
  readonly balancer?: Balancer
  /** Drop in training what exceeds the budget of a device, as V2 did. Default: no token is dropped. */
  readonly dropping?: TokenDropping & {
    /** Share of the sequences that lose no token in any layer, drawn anew for every batch from the seed, the step and its tokens. Default 0.1. */
    readonly undropped?: number
  }
  /** Trade time for memory in training. Default: everything is kept. */
  readonly recompute?: Recompute
  /** Is given the loads and selection biases of every layer after each step. */
  readonly monitor?: LoadMonitor
}

/** How a stored model is opened: `seed` has nothing to draw there. */
export interface FromPretrainedOptions extends Omit<DeepSeekOptions, 'seed'>, FolderOptions {
  /**
   * In place of what its config.json says: `{ max_position_embeddings, rope_scaling }` for a longer context, say. `original_max_position_embeddings` of `rope_scaling` is by default the context that the model
   * was trained with so far. Sizes of weights stay those of the weights.
   */
  readonly config?: Partial<LatentConfigInput> | Partial<DenseConfigInput>
}

export const optionNames: OptionNames<DeepSeekOptions> = {
  seed: true,
  backend: true,
  weights: true,
  objective: true,
  balancer: true,
  dropping: true,
  recompute: true,
  monitor: true,
}

export const droppingNames: OptionNames<DeepSeekOptions['dropping'] & object> = {
  devices: true,
  capacity_factor: true,
  undropped: true,
}

export const usualObjective: Objective = {
  mtpWeight: 0.3,
  balanceWeight: 1e-4,
  biasSpeed: 0.001,
  mtpDetached: false,
  mtpAcceptance: false,
}

/** @throws MoeError E_CONFIG for what is none */
export function checkRecompute(recompute: Recompute | undefined): void {
  const every = typeof recompute === 'object' ? recompute?.every : undefined
  if (recompute === undefined || recompute === 'selective' || recompute === 'layers') return
  if (Number.isSafeInteger(every) && Number(every) >= 1) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'DeepSeek',
    problem: `recompute is ${shown(recompute)}`,
    fix: "pass 'selective', 'layers' or { every: 2 }",
  })
}
