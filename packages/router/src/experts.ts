/** @file The routed experts: E SwiGLU nets, stacked in memory, separate in checkpoints. */
import {
  groupedMatmul,
  type InitOptions,
  Module,
  normalParameter,
  type Parameter,
  swiglu,
  type Tensor,
} from '@moe/core'

/** E feed-forward nets down(silu(gate(x)) * up(x)). Stored as `{e}.gate_proj.weight` and so on. */
export class Experts extends Module {
  /** `[E, inner, hidden]`. */
  gate_proj: Parameter
  /** `[E, inner, hidden]`. */
  up_proj: Parameter
  /** `[E, hidden, inner]`. */
  down_proj: Parameter
  override readonly stacked = {
    gate_proj: (expert: number) => `${expert}.gate_proj.weight`,
    up_proj: (expert: number) => `${expert}.up_proj.weight`,
    down_proj: (expert: number) => `${expert}.down_proj.weight`,
  }

  constructor(experts: number, hidden: number, inner: number, init: InitOptions = {}) {
    super()
    this.gate_proj = normalParameter([experts, inner, hidden], 'gate_proj', init)
    this.up_proj = normalParameter([experts, inner, hidden], 'up_proj', init)
    this.down_proj = normalParameter([experts, hidden, inner], 'down_proj', init)
  }

  /** Rows `[M, hidden]` in expert order, of which expert e owns `offsets[e] .. offsets[e+1]` (`i32 [E+1]`), to `[M, hidden]`. */
  forward(x_MD: Tensor, offsets: Tensor): Tensor {
    const inner_MI = swiglu(groupedMatmul(x_MD, this.gate_proj, offsets), groupedMatmul(x_MD, this.up_proj, offsets))
    return groupedMatmul(inner_MI, this.down_proj, offsets)
  }
}
