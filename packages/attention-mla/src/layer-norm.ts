/** @file Layer normalization (Ba et al. 2016), which the lightning indexer applies to its keys. */
import { type Backend, Module, ones, Parameter, type Tensor, zeros } from '@moe/core'

/** As in the released code of DeepSeek-V3.2. */
const eps = 1e-6

/** Subtracts the mean of the last axis and divides by the standard deviation; then weight and bias. */
export class LayerNorm extends Module {
  /** `[features]`, initially 1. */
  weight: Parameter
  /** `[features]`, initially 0. */
  bias: Parameter

  /** Creates a norm over `features` features. */
  constructor(features: number, backend?: Backend) {
    super()
    this.weight = new Parameter(ones([features], { backend }))
    this.bias = new Parameter(zeros([features], { backend }))
  }

  /** Maps x `[..., features]` to the same shape. */
  forward(x: Tensor): Tensor {
    const centered = x.sub(x.mean(-1, true))
    const variance = centered.mul(centered).mean(-1, true)
    return centered.mul(variance.add(eps).rsqrt()).mul(this.weight).add(this.bias)
  }
}
