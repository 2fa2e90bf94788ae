/**
 * @file DeepSeekMoE: routed and shared experts in place of a feed-forward network (V3 report eq. 12-13). No token is
 * dropped, unless V2's token dropping is enabled.
 */
import {
  checkOptions,
  checkShared,
  type DispatchPlan,
  dispatchPlan,
  disposeAfterUse,
  forkInit,
  type InitOptions,
  initNames,
  isFrozen,
  isRecomputing,
  Module,
  MoeError,
  needAxes,
  noGrad,
  type OptionNames,
  SwigluMlp,
  scope,
  shown,
  type Tensor,
} from '@moe/core'
import { type BiasUpdateOptions, biasUpdateNames, sequenceBalanceLoss, updateBias } from './balance.ts'
import { type Balancer, needBalancer } from './balancer.ts'
import type { RouterConfig } from './config.ts'
import { Experts } from './experts.ts'
import { Gate } from './gate.ts'
import { LoadCounter, maskedCounts } from './load.ts'
import { checkDropping, type TokenDropping, withinDeviceBudget } from './token-dropping.ts'

/** Options of an MoE layer: initialization, and how its experts are balanced. */
export interface MoELayerOptions extends InitOptions {
  /** Balances the load of the experts. One balancer serves all layers. Without one, call `updateBias` yourself. */
  readonly balancer?: Balancer | undefined
  /** Drops choices that exceed the budget of a device during training, as in V2. Default: no token is dropped (V3). */
  readonly dropping?: TokenDropping | undefined
}

const optionNames: OptionNames<MoELayerOptions> = { ...initNames, balancer: true, dropping: true }

/** Options of a forward pass: what to count, and callbacks for loads and losses. */
export interface MoEForwardOptions {
  /** Counts the load, for the balancer and for monitoring. Default false: evaluation and decoding leave no trace. */
  readonly training?: boolean | undefined
  /**
   * `f32 [batch, time]`: 1 for tokens and 0 for padding, which is computed, but neither counted nor balanced. Default:
   * no padding.
   */
  readonly mask?: Tensor | undefined
  /**
   * `f32 [batch]`: 1 for sequences whose tokens are never dropped (in V2 about a tenth, the same in all layers).
   * Default: none.
   */
  readonly undropped?: Tensor | undefined
  /** If given, is called with the layer's sequence-wise balance loss (a scalar without α). */
  readonly onBalanceLoss?: ((loss: Tensor) => void) | undefined
  /**
   * If given, is called in training with the loss of the layer's balancer (a scalar, including its factor), if the
   * balancer has one.
   */
  readonly onBalancerLoss?: ((loss: Tensor) => void) | undefined
  /**
   * If given, is called with the loads `i32 [E]` of every pass, including evaluation, but not when a pass is
   * recomputed.
   */
  readonly onLoad?: ((load: Tensor) => void) | undefined
}

/** The experts chosen for the tokens of a pass. */
export interface Choice {
  /** Tokens `[N, hidden]`. */
  readonly x: Tensor
  /** Gates `[N, K]`; 0 for dropped choices. */
  readonly weights: Tensor
  /** Experts `i32 [N, K]`. */
  readonly indices: Tensor
  /** The same choices sorted by expert, as `Experts.route` takes them. */
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

/**
 * MoE layer: y = sum over the K chosen experts of gate * FFN_e(x), plus the shared experts' FFN(x). Maps `[B, T,
 * hidden]` to the same shape.
 */
export class MoELayer extends Module {
  /** Chooses K of E experts for each token. */
  gate: Gate
  /** The E routed experts. */
  experts: Experts
  /**
   * The network that every token goes through, `n_shared_experts` times as wide as an expert. Missing if there are no
   * shared experts.
   */
  declare shared_experts?: SwigluMlp
  readonly #config: RouterConfig
  readonly #balancer: Balancer | null
  /** Loads since the last `updateBias` or `rebalance`. */
  readonly #load = new LoadCounter()
  readonly #dropping: TokenDropping | null
  readonly #kept = new LoadCounter()
  /**
   * Number of optimizer steps done, for the balancer's schedules. `rebalance` increments it. Set it when you resume a
   * run.
   */
  step = 0

  /** @throws MoeError E_CONFIG that lists all problems; E_ATTR for invalid token dropping */
  constructor(config: RouterConfig, options: MoELayerOptions = {}) {
    super()
    checkOptions('MoELayer', options, optionNames)
    const { balancer = null, dropping = null, ...init } = options
    if (balancer !== null) needBalancer('MoELayer', balancer)
    this.#config = config
    this.#balancer = balancer
    this.#dropping = dropping
    this.gate = new Gate(config, forkInit(init, 'gate'))
    if (dropping !== null) checkDropping('MoELayer dropping', dropping, config.n_routed_experts)
    if (balancer?.update && !this.gate.e_score_correction_bias)
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'MoELayer',
        problem: `the balancer updates a selection bias, but topk_method ${shown(config.topk_method)} has none`,
        fix: 'use a balance loss (sequenceWise(), expertLevel()), or set topk_method to noaux_tc',
      })
    const { hidden_size: hidden, moe_intermediate_size: inner, n_shared_experts: shared } = config
    this.experts = new Experts(config.n_routed_experts, hidden, inner, forkInit(init, 'experts'))
    if (shared) this.shared_experts = new SwigluMlp(hidden, shared * inner, forkInit(init, 'shared_experts'))
  }

  /** Maps x `[batch, time, hidden]` to the same shape. @throws MoeError E_SHAPE, E_CONFIG */
  forward(x_BTD: Tensor, options: MoEForwardOptions = {}): Tensor {
    const { x, weights, plan } = this.choose(x_BTD, options)
    const routed_ND = this.experts.route(x, weights, plan)
    if (!this.shared_experts) return routed_ND.reshape(x_BTD.shape)
    const shared_ND = this.shared_experts.forward(x)
    const out_ND = routed_ND.add(shared_ND)
    // No gradient rule reads the summands.
    for (const part of [routed_ND, shared_ND]) disposeAfterUse(part)
    return out_ND.reshape(x_BTD.shape)
  }

  /**
   * Runs `forward` up to the experts, and returns the chosen experts of each token. Counts loads and calls the
   * callbacks. Use it if the experts run elsewhere.
   */
  choose(x_BTD: Tensor, options: MoEForwardOptions = {}): Choice {
    needAxes('MoELayer', x_BTD, ['batch', 'time', this.#config.hidden_size])
    checkShared('MoELayer.forward', options, forwardNames)
    const [batch, time, hidden] = x_BTD.shape
    const x = x_BTD.reshape([batch * time, hidden])
    const { weights, indices, scores } = this.gate.forward(x)
    const plan = dispatchPlan(indices, this.#config.n_routed_experts)
    this.#reportLoad(scores, indices, plan, batch, options)
    const gates =
      this.#dropping && options.training ? weights.mul(this.#withinBudget(scores, indices, batch, options)) : weights
    return { x, weights: gates, indices, plan }
  }

  /**
   * Returns which choices V2's token dropping keeps, and counts them. Dropped ones are still computed, with weight 0.
   */
  #withinBudget(scores: Tensor, indices: Tensor, sequences: number, { mask, undropped }: MoEForwardOptions): Tensor {
    const pass = { scores, indices, sequences, mask: mask?.reshape([scores.shape[0]]), undropped }
    const kept = withinDeviceBudget(pass, this.#dropping as TokenDropping)
    this.#kept.add(scope(() => kept.sum().cast('i32').reshape([1])))
    return kept
  }

  /** Counts the loads and computes the requested losses. */
  #reportLoad(
    scores: Tensor,
    indices: Tensor,
    plan: DispatchPlan,
    sequences: number,
    options: MoEForwardOptions,
  ): void {
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

  /** Number of choices `i32 [1]` that were not dropped, counted like `load`; null without dropping. */
  get kept(): Tensor | null {
    return this.#kept.total
  }

  /**
   * Loads `i32 [E]` since the last update, before dropping, as a tensor on the device; null before the first training
   * pass.
   */
  get load(): Tensor | null {
    return this.#load.total
  }

  /** The balancer passed in the options, or null. */
  get balancer(): Balancer | null {
    return this.#balancer
  }

  /**
   * Lets the balancer update the selection bias from the loads counted since the last call, and resets the counts. Call
   * it once per optimizer step. A bias that `addAdapters` has frozen is not changed.
   *
   * `reduce` sums the loads of all ranks (an all-reduce). `step`, for the balancer's schedules, defaults to the number
   * of previous calls.
   */
  rebalance(options: { reduce?: (load: Tensor) => Tensor; step?: number } = {}): void {
    checkOptions('MoELayer.rebalance', options, { reduce: true, step: true })
    const { reduce, step = this.step } = options
    const load = this.#load.total
    const bias = this.gate.e_score_correction_bias
    if (load !== null && bias && !isFrozen(bias))
      scope(() => noGrad(() => this.#balancer?.update?.(bias, reduce?.(load) ?? load, step)))
    this.#load.reset()
    this.#kept.reset()
    this.step = step + 1
  }

  /**
   * Updates the selection bias from the loads counted since the last call, and resets the counts: auxiliary-loss-free
   * balancing without a balancer. Call it once per optimizer step. A bias that `addAdapters` has frozen is not changed.
   *
   * `reduce` sums the loads of all ranks (an all-reduce). Default: there is only one rank.
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
