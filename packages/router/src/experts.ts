/** @file The routed experts: E SwiGLU networks, stacked in memory and separate in checkpoints. */
import {
  checkOptions,
  combineTokens,
  copyRows,
  type DispatchPlan,
  deferWeights,
  groupedLinear,
  type InitOptions,
  initNames,
  isPlain,
  Module,
  MoeError,
  type Parameter,
  permuteTokens,
  QuantizedParameter,
  routedExperts,
  swiglu,
  type Tensor,
  weightParameter,
  weightShape,
  withKept,
  withRecomputed,
} from '@moe/core'

/** E feed-forward networks down(silu(gate(x)) * up(x)). Checkpoint keys are `{e}.gate_proj.weight` and so on. */
export class Experts extends Module {
  /** `[E, inner, hidden]`. */
  gate_proj: Parameter
  /** `[E, inner, hidden]`. */
  up_proj: Parameter
  /** `[E, hidden, inner]`. */
  down_proj: Parameter
  /**
   * Recomputes the tokens in expert order and the gated activations in the backward pass instead of keeping them. May
   * be changed between passes. With a kernel for `routedExperts`, they are never kept. Default false.
   */
  recompute = false
  override readonly quantizable = ['gate_proj', 'up_proj', 'down_proj']
  override readonly stacked = {
    gate_proj: (expert: number) => `${expert}.gate_proj.weight`,
    up_proj: (expert: number) => `${expert}.up_proj.weight`,
    down_proj: (expert: number) => `${expert}.down_proj.weight`,
  }

  /**
   * Creates `experts` networks with `hidden` inputs and outputs and `inner` intermediate features.
   * @throws MoeError E_CONFIG for an unknown option
   */
  constructor(experts: number, hidden: number, inner: number, init: InitOptions = {}) {
    super()
    checkOptions('Experts', init, initNames)
    this.gate_proj = weightParameter([experts, inner, hidden], 'gate_proj', init)
    this.up_proj = weightParameter([experts, inner, hidden], 'up_proj', init)
    this.down_proj = weightParameter([experts, hidden, inner], 'down_proj', init)
  }

  /**
   * Returns a copy of the experts `from` to `to - 1`, for example the share of a rank. The copy is trained
   * independently. If the weights are deferred (`deferWeights`), so are those of the copy.
   * @throws MoeError E_UNSUPPORTED if the weights have adapters
   */
  copyOf(from: number, to: number): Experts {
    const names = ['gate_proj', 'up_proj', 'down_proj'] as const
    if (names.some(name => this[name].adapter !== null)) {
      const fix = 'merge the adapters first, or train the whole model on every rank'
      throw new MoeError({
        code: 'E_UNSUPPORTED',
        op: 'copyOf',
        problem: 'experts with adapters cannot be copied',
        fix,
      })
    }
    const { gate_proj: gate } = this
    const weights = gate instanceof QuantizedParameter ? gate.weight.format : undefined
    const [, inner, hidden] = weightShape(gate)
    const copy = deferWeights(() => new Experts(to - from, hidden, inner, { std: 0, backend: gate.backend, weights }))
    for (const name of names) {
      copyRows(copy[name], this[name], from, to)
      copy[name].trainable = this[name].trainable
    }
    return copy
  }

  /**
   * Maps rows `[M, hidden]` in expert order to `[M, hidden]`. Rows `offsets[e]` to `offsets[e+1] - 1` belong to expert
   * e (`i32 [E+1]`).
   */
  forward(x_MD: Tensor, offsets: Tensor): Tensor {
    return this.#down(this.#gateAndUp(x_MD, offsets), offsets)
  }

  #gateAndUp(x_MD: Tensor, offsets: Tensor): readonly [gate_MI: Tensor, up_MI: Tensor] {
    return [groupedLinear(x_MD, this.gate_proj, offsets), groupedLinear(x_MD, this.up_proj, offsets)]
  }

  #down(gateAndUp: readonly [gate_MI: Tensor, up_MI: Tensor], offsets: Tensor): Tensor {
    return this.#through(
      (gate, up) => [swiglu(gate, up)],
      inner_MI => groupedLinear(inner_MI, this.down_proj, offsets),
      ...gateAndUp,
    )
  }

  get #through(): typeof withRecomputed {
    return this.recompute ? withRecomputed : withKept
  }

  /**
   * Runs the chosen experts on tokens `[N, hidden]` and returns the sum of their outputs, weighted by `weights [N, K]`:
   * `[N, hidden]`.
   */
  route(x_ND: Tensor, weights_NK: Tensor, plan: DispatchPlan): Tensor {
    const { gate_proj: gate, up_proj: up, down_proj: down } = this
    const { recompute } = this
    if ([gate, up, down].every(isPlain)) return routedExperts(x_ND, { gate, up, down }, weights_NK, plan, { recompute })
    const gateAndUp = this.#through(
      x => [permuteTokens(x, plan)],
      x_MD => this.#gateAndUp(x_MD, plan.offsets),
      x_ND,
    )
    return combineTokens(this.#down(gateAndUp, plan.offsets), weights_NK, plan)
  }
}
