/** @file Options of a model: initialization, load balancing, training loss, memory. */
import { type Backend, checkOptions, MoeError, type OptionNames, shown, type WeightFormat } from '@moe/core'
import type { Balancer, LoadMonitor, Scheduled, TokenDropping } from '@moe/router'

/**
 * Weights of the auxiliary training losses and speed of the balance bias. Each is a number or a function of the optimizer steps done (`model.step`), and may be
 * changed between steps.
 */
export interface Objective {
  /** Weight λ of the multi-token prediction loss (V3: 0.3, later 0.1). */
  mtpWeight: Scheduled
  /** Weight α of the sequence-wise balance loss (V3: 1e-4). Not used with a balancer. */
  balanceWeight: Scheduled
  /** Update speed γ of the balance bias (V3: 0.001). Not used with a balancer. */
  biasSpeed: Scheduled
  /** Whether to train only the MTP modules with their loss, without gradients to the main model. Default false. */
  mtpDetached: boolean
  /**
   * Weight of the loss that trains the indexers of sparse attention (V3.2 report, eq. 3 and 4). It gives no gradient to the rest of the model. 0 saves the time to compute it, for example if
   * indexers are frozen. Default 1.
   */
  indexerWeight: Scheduled
  /**
   * Whether training uses attention to all keys instead of sparse attention, so that new indexers learn to rank all keys before the model depends on them (V3.2 report, dense warm-up stage). Evaluation
   * and generation stay sparse. Default false.
   */
  indexerWarmup: boolean
  /** Whether to log, with each training loss, the share of drafts that the main model would accept at each depth. This computes the logits of all depths. Default false. */
  mtpAcceptance: boolean
}

/**
 * What the backward pass recomputes instead of keeping it in memory. Losses and gradients stay the same, bit for bit.
 * - `'selective'`: norms, MLA up-projections, gated activations (DeepSeek-V3 report 3.2.3 and 3.3.3), and tokens sorted by expert.
 * - `'layers'`: every layer; only its input is kept.
 * - `{ every: n }`: every n-th layer.
 *
 * Layers of MTP modules count as layers.
 */
export type Recompute = 'selective' | 'layers' | { readonly every: number }

/** Options of `new DeepSeek`. */
export interface DeepSeekOptions {
  /** Seed of the random weights. Null creates zeros, which is fast, to be filled by `loadWeights`. Default 0. */
  readonly seed?: number | null | undefined
  /** Backend of the weights. Default: that of `setDefaultBackend`. */
  readonly backend?: Backend | undefined
  /** Format of quantized weights, for inference: see `quantizeWeights`. Checkpoints are quantized tensor by tensor while they are read. Default: f32. */
  readonly weights?: WeightFormat | undefined
  /** Overrides of the defaults: mtpWeight 0.3, balanceWeight 1e-4, biasSpeed 0.001, indexerWeight 1, joint training of the MTP modules. */
  readonly objective?: Partial<Objective> | undefined
  /** A balancer that keeps the experts evenly loaded, instead of `balanceWeight` and `biasSpeed`. */
  readonly balancer?: Balancer | undefined
  /** Token dropping in training beyond the budget of a device, as in V2. Default: no token is dropped. */
  readonly dropping?:
    | (TokenDropping & {
        /** Share of the sequences that lose no token in any layer, drawn for every batch from the seed, the step and its tokens. Default 0.1. */
        readonly undropped?: number | undefined
      })
    | undefined
  /** What the backward pass recomputes, to save memory in training. Default: nothing. */
  readonly recompute?: Recompute | undefined
  /** Receives the loads and balance biases of every layer after each step. */
  readonly monitor?: LoadMonitor | undefined
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

type Dropping = DeepSeekOptions['dropping'] & object

const droppingNames: OptionNames<Dropping> = { devices: true, capacity_factor: true, undropped: true }

/** Checks what the layers do not check. @throws MoeError E_CONFIG */
export function checkDropping(dropping: Dropping): void {
  checkOptions('DeepSeek dropping', dropping, droppingNames)
  const { undropped = 0 } = dropping
  if (typeof undropped === 'number' && undropped >= 0 && undropped <= 1) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'DeepSeek dropping',
    problem: `undropped = ${shown(undropped)} is not a share from 0 to 1`,
    fix: 'pass 0.1 (V2), or leave it out',
  })
}

export const defaultObjective: Objective = {
  mtpWeight: 0.3,
  balanceWeight: 1e-4,
  biasSpeed: 0.001,
  mtpDetached: false,
  indexerWeight: 1,
  indexerWarmup: false,
  mtpAcceptance: false,
}

/** @throws MoeError E_CONFIG */
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
