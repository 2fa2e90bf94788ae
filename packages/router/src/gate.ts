/** @file The gate: affinities of tokens to experts, and the choice among experts (V3 report eq. 12-16). */
import {
  checkOptions,
  type InitOptions,
  initNames,
  Module,
  normalParameter,
  Parameter,
  type RouterAttrs,
  type Routing,
  routerTopk,
  type Tensor,
  zeros,
} from '@moe/core'
import { type RouterConfig, routerAttrs } from './config.ts'

/**
 * Routes N tokens to E experts. The bias is f32, affects only the choice, and is changed by a balancer, never by
 * gradients.
 */
export class Gate extends Module {
  /** Expert centroids `[E, hidden]`. */
  weight: Parameter
  /** Selection bias `[E]`, added to the affinities for the choice. Only with noaux_tc. */
  declare e_score_correction_bias?: Parameter
  readonly #attrs: RouterAttrs

  /** @throws MoeError E_CONFIG that lists all problems */
  constructor(config: RouterConfig, init: InitOptions = {}) {
    super()
    this.#attrs = routerAttrs(config)
    checkOptions('Gate', init, initNames)
    const experts = config.n_routed_experts
    this.weight = normalParameter([experts, config.hidden_size], 'weight', init)
    if ((config.topk_method ?? 'noaux_tc') === 'noaux_tc') {
      this.e_score_correction_bias = new Parameter(zeros([experts], { backend: init.backend }), { trainable: false })
    }
  }

  /**
   * Maps `[N, hidden]` to gates and chosen experts. The affinities are computed in f32, regardless of `withPrecision`.
   */
  forward(x_ND: Tensor): Routing {
    const logits_NE = x_ND.matmul(this.weight, { transposeB: true, precision: 'f32' })
    const bias_E = this.e_score_correction_bias ?? zeros([logits_NE.shape[1]], { backend: logits_NE.backend })
    return routerTopk(logits_NE, bias_E, this.#attrs)
  }
}
