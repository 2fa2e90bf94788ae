/** @file DeepSeekMoE: routed and shared experts in place of a feed-forward net (V3 report eq. 12-13). No token is dropped unless V2's dropping is asked for. */
import {
  checkOptions,
  checkShared,
  type DispatchPlan,
  dispatchPlan,
  forkInit,
  type InitOptions,
  initNames,
  isFrozen,
  isRecomputing,
  Module,
  MoeError,
  needAxes,
  type OptionNames,
  SwigluMlp,
  scope,
  shown,
  type Tensor,
  usedUp,
} from '@moe/core'
import { type BiasUpdateOptions, biasUpdateNames, sequenceBalanceLoss, updateBias } from './balance.ts'
import { type Balancer, needBalancer } from './balancer.ts'
import type { RouterConfig } from './config.ts'
import { Experts } from './experts.ts'
import { Gate } from './gate.ts'
import { LoadCounter, maskedCounts } from './load.ts'
import { droppingNames, type TokenDropping, withinDeviceBudget } from './token-dropping.ts'

/** How an MoE layer starts, and what keeps its experts evenly loaded. */
export interface MoELayerOptions extends InitOptions {
  /** What keeps the experts evenly loaded; one for all layers. Without one, call `updateBias` yourself. */
  readonly balancer?: Balancer
  /** Drop in training what exceeds the budget of a device, as V2 did. Default: no token is dropped (V3). */
  readonly dropping?: TokenDropping
}

const optionNames: OptionNames<MoELayerOptions> = { ...initNames, balancer: true, dropping: true }

/** What a pass counts, and to whom it tells loads and losses. */
export interface MoEForwardOptions {
  /** Count the load, for the balancer and for monitoring. Default false: evaluation and decoding leave no trace. */
  readonly training?: boolean
  /** `f32 [batch, time]`, 1 for tokens and 0 for padding, which is computed but neither counted nor balanced. Default: no padding. */
  readonly mask?: Tensor
  /** `f32 [batch]`, 1 for sequences that lose no token to dropping (V2: about a tenth, the same in all layers). Default: none. */
  readonly undropped?: Tensor
  /** Is given the layer's sequence-wise balance loss (a scalar without α), when it is wanted. */
  readonly onBalanceLoss?: (loss: Tensor) => void
  /** Is given the loss of the layer's balancer (a scalar, factor included), in training and when it has one. */
  readonly onBalancerLoss?: (loss: Tensor) => void
  /** Is given the loads `i32 [E]` of every pass, evaluation included, except when it is a recomputation. */
  readonly onLoad?: (load: Tensor) => void
}

/** Where the tokens of a pass go. */
export interface Choice {
  /** Tokens `[N, hidden]`. */
  readonly x: Tensor
  /** Gates `[N, K]`, 0 for what is dropped. */
  readonly weights: Tensor
  /** Experts `i32 [N, K]`. */
  readonly indices: Tensor
  /** The same choices sorted by expert: what `Experts.route` takes. */
  readonly plan: DispatchPlan
}

const forwardNames: OptionNames<MoEForwardOptions> = {
  training: true,
  mask: true,
  undropped: true,
  onBalanceLoss: true,
  onBalancerLoss: true,
  onLoad: true,
}

/** y = sum over the K chosen experts of gate * FFN_e(x), plus the shared experts' FFN(x). `[B, T, hidden]` to the same shape. */
export class MoELayer extends Module {
  /** Chooses K of E experts for each token. */
  gate: Gate
  /** E nets. */
  experts: Experts
  /** The net that every token goes through, `n_shared_experts` times as wide as an expert; not there without shared experts. */
  declare shared_experts?: SwigluMlp
  readonly #config: RouterConfig
  readonly #balancer: Balancer | null
  /** Loads since the last `updateBias` or `rebalance`. */
  readonly #load = new LoadCounter()
  readonly #dropping: TokenDropping | null
  readonly #kept = new LoadCounter()
  /** Optimizer steps done, for the balancer's schedules: `rebalance` counts. Set it when a run is resumed. */
  step = 0

  /** @throws MoeError E_CONFIG with every fault in one message. */
  constructor(config: RouterConfig, options: MoELayerOptions = {}) {
    super()
    checkOptions('MoELayer', options, optionNames)
    const { balancer = null, dropping = null, ...init } = options
    if (dropping !== null) checkOptions('MoELayer dropping', dropping, droppingNames)
    if (balancer !== null) needBalancer('MoELayer', balancer)
    this.#config = config
    this.#balancer = balancer
    this.#dropping = dropping
    this.gate = new Gate(config, forkInit(init, 'gate'))
    if (balancer?.update && !this.gate.e_score_correction_bias)
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'MoELayer',
        problem: `the balancer moves a selection bias, which topk_method ${shown(config.topk_method)} does not have`,
        fix: 'balance by a loss (sequenceWise(), expertLevel()), or choose noaux_tc',
      })
    const { hidden_size: hidden, moe_intermediate_size: inner, n_shared_experts: shared } = config
    this.experts = new Experts(config.n_routed_experts, hidden, inner, forkInit(init, 'experts'))
    if (shared) this.shared_experts = new SwigluMlp(hidden, shared * inner, forkInit(init, 'shared_experts'))
  }

  /** x `[batch, time, hidden]` to the same shape. @throws MoeError E_SHAPE, E_CONFIG */
  forward(x_BTD: Tensor, options: MoEForwardOptions = {}): Tensor {
    const { x, weights, plan } = this.choose(x_BTD, options)
    const routed_ND = this.experts.route(x, weights, plan)
    if (!this.shared_experts) return routed_ND.reshape(x_BTD.shape)
    const shared_ND = this.shared_experts.forward(x)
    const out_ND = routed_ND.add(shared_ND)
    // No gradient rule reads what is added.
    for (const part of [routed_ND, shared_ND]) usedUp(part)
    return out_ND.reshape(x_BTD.shape)
  }

  /** `forward` up to the experts: which of them each token goes to. Loads are counted and losses handed out here. */
  choose(x_BTD: Tensor, options: MoEForwardOptions = {}): Choice {
    needAxes('MoELayer', x_BTD, ['batch', 'time', 'hidden'])
    checkShared('MoELayer.forward', options, forwardNames)
    const [batch, time, hidden] = x_BTD.shape
    const x = x_BTD.reshape([batch * time, hidden])
    const { weights, indices, scores } = this.gate.forward(x)
    const plan = dispatchPlan(indices, this.#config.n_routed_experts)
    this.#watch(scores, indices, plan, batch, options)
    const gates =
      this.#dropping && options.training ? weights.mul(this.#budgeted(scores, indices, batch, options)) : weights
    return { x, weights: gates, indices, plan }
  }

  /** Which choices V2's dropping keeps, counted. Dropped ones are still computed, and weighted with 0. */
  #budgeted(scores: Tensor, indices: Tensor, sequences: number, { mask, undropped }: MoEForwardOptions): Tensor {
    const pass = { scores, indices, sequences, mask: mask?.reshape([scores.shape[0]]), undropped }
    const kept = withinDeviceBudget(pass, this.#dropping as TokenDropping)
    this.#kept.add(scope(() => kept.sum().cast('i32').reshape([1])))
    return kept
  }

  /** Counts the loads and hands out the losses that were asked for. */
  #watch(scores: Tensor, indices: Tensor, plan: DispatchPlan, sequences: number, options: MoEForwardOptions): void {
    const { training = false, onBalanceLoss, onBalancerLoss, onLoad } = options
    const mask = options.mask?.reshape([scores.shape[0]])
    if (training || onLoad) {
      const counts = mask ? maskedCounts(indices, mask, this.#config.n_routed_experts) : plan.counts
      if (training) this.#load.add(counts)
      if (!isRecomputing()) onLoad?.(counts)
    }
    onBalanceLoss?.(sequenceBalanceLoss(scores, sequences, this.#config.num_experts_per_tok, mask))
    if (!training || !onBalancerLoss) return
    const loss = this.#balancer?.loss?.({ scores, indices, sequences, mask }, this.step) ?? null
    if (loss !== null) onBalancerLoss(loss)
  }

  /** Choices `i32 [1]` that were not dropped, counted as `load` is; null without dropping. */
  get kept(): Tensor | null {
    return this.#kept.total
  }

  /** Loads `i32 [E]` since the last update, before dropping, still on the device; null before any training pass. */
  get load(): Tensor | null {
    return this.#load.total
  }

  /** That of the options; null without one. */
  get balancer(): Balancer | null {
    return this.#balancer
  }

  /**
   * Lets the balancer act on the loads counted since the last call, and starts counting anew. Once per optimizer step. A bias that `addAdapters` froze stays.
   * `reduce` makes the loads of one rank those of all (an all-reduce); `step`, for the balancer's schedules, is by default the number of calls before.
   */
  rebalance(options: { reduce?: (load: Tensor) => Tensor; step?: number } = {}): void {
    checkOptions('MoELayer.rebalance', options, { reduce: true, step: true })
    const { reduce, step = this.step } = options
    const load = this.#load.total
    const bias = this.gate.e_score_correction_bias
    if (load !== null && bias && !isFrozen(bias)) this.#balancer?.update?.(bias, reduce?.(load) ?? load, step)
    this.#load.reset()
    this.#kept.reset()
    this.step = step + 1
  }

  /**
   * Moves the selection bias by the loads counted since the last call, and starts counting anew: aux-free balancing without a balancer.
   * Once per optimizer step. A bias that `addAdapters` froze stays. `reduce` makes the loads of one rank those of all (an all-reduce); default: there is one rank.
   */
  updateBias(options: BiasUpdateOptions & { reduce?: (load: Tensor) => Tensor } = {}): void {
    checkOptions('MoELayer.updateBias', options, { ...biasUpdateNames, reduce: true })
    const { reduce, ...update } = options
    const load = this.#load.total
    const bias = this.gate.e_score_correction_bias
    if (load !== null && bias && !isFrozen(bias)) updateBias(bias, reduce?.(load) ?? load, update)
    this.#load.reset()
    this.#kept.reset()
  }
}
