/** @file DeepSeekMoE: routed and shared experts in place of a feed-forward net (V3 report eq. 12-13). No token is dropped. */
import {
  combineTokens,
  dispatchPlan,
  forkInit,
  type InitOptions,
  Module,
  permuteTokens,
  SwigluMlp,
  type Tensor,
} from '@moe/core'
import { type BiasUpdateOptions, sequenceBalanceLoss, updateBias } from './balance.ts'
import type { RouterConfig } from './config.ts'
import { Experts } from './experts.ts'
import { Gate } from './gate.ts'
import { LoadCounter } from './load.ts'

export interface MoEForwardOptions {
  /** Count the load, for the balancer and for monitoring. Default false: evaluation and decoding leave no trace. */
  readonly training?: boolean
  /** Is given the layer's sequence-wise balance loss (a scalar without α), when it is wanted. */
  readonly onBalanceLoss?: (loss: Tensor) => void
}

/** y = sum over the K chosen experts of gate * FFN_e(x), plus the shared experts' FFN(x). `[B, T, hidden]` to the same shape. */
export class MoELayer extends Module {
  gate: Gate
  experts: Experts
  declare shared_experts?: SwigluMlp
  readonly #config: RouterConfig
  /** Loads since the last `updateBias`. */
  readonly #load = new LoadCounter()

  /** @throws MoeError E_CONFIG with every fault in one message. */
  constructor(config: RouterConfig, init: InitOptions = {}) {
    super()
    this.#config = config
    const { hidden_size: hidden, moe_intermediate_size: inner, n_shared_experts: shared } = config
    this.gate = new Gate(config, forkInit(init, 'gate'))
    this.experts = new Experts(config.n_routed_experts, hidden, inner, forkInit(init, 'experts'))
    if (shared) this.shared_experts = new SwigluMlp(hidden, shared * inner, forkInit(init, 'shared_experts'))
  }

  forward(x_BTD: Tensor, options: MoEForwardOptions = {}): Tensor {
    const { n_routed_experts: experts, num_experts_per_tok: topK } = this.#config
    const [batch, time, hidden] = x_BTD.shape
    const x_ND = x_BTD.reshape([batch * time, hidden])
    const { weights, indices, scores } = this.gate.forward(x_ND)
    const plan = dispatchPlan(indices, experts)
    if (options.training) this.#load.add(plan.counts)
    options.onBalanceLoss?.(sequenceBalanceLoss(scores, batch, topK))
    const routed_ND = combineTokens(this.experts.forward(permuteTokens(x_ND, plan), plan.offsets), weights, plan)
    const out_ND = this.shared_experts ? routed_ND.add(this.shared_experts.forward(x_ND)) : routed_ND
    return out_ND.reshape([batch, time, hidden])
  }

  /** Loads `i32 [E]` since the last update, still on the device; null before any training pass. */
  get load(): Tensor | null {
    return this.#load.total
  }

  /**
   * Moves the selection bias by the loads counted since the last call, and starts counting anew. Once per optimizer step.
   * `reduce` makes the loads of one rank those of all (an all-reduce); default: there is one rank.
   */
  updateBias(options: BiasUpdateOptions & { reduce?: (load: Tensor) => Tensor } = {}): void {
    const load = this.#load.total
    if (load !== null && this.gate.e_score_correction_bias) {
      updateBias(this.gate.e_score_correction_bias, options.reduce?.(load) ?? load, options)
    }
    this.#load.reset()
  }
}
