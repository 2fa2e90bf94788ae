/** @file The layers that every part of a model uses: linear, embedding, RMSNorm, SwiGLU MLP; and how they are initialized. */

import { withKept, withRecomputed } from '../autograd/checkpoint.ts'
import type { Backend, WeightFormat } from '../backend.ts'
import { noGrad, widePrecision, withPrecision } from '../context.ts'
import { ones, randn, zeros } from '../create.ts'
import { MoeError } from '../errors.ts'
import { zeroWeight } from '../fused/quantized-matmul.ts'
import { rmsNorm } from '../fused/rms-norm.ts'
import { swiglu } from '../fused/swiglu.ts'
import { checkOptions, type OptionNames } from '../options.ts'
import { Random } from '../random.ts'
import { keep, scope } from '../scope.ts'
import type { Tensor } from '../tensor.ts'
import { pendingDraws } from './create-module.ts'
import { Module } from './module.ts'
import { Parameter } from './parameter.ts'
import { embeddingRows, linear, QuantizedParameter, quantizedParameter } from './quantized.ts'

/** How a module's parameters start. */
export interface InitOptions {
  /**
   * Source of the initial weights; the same seed gives the same weights on every backend. It is not drawn from: each parameter has a stream of its own, by its name, so that weights do not
   * depend on what else is made. Of modules of a kind that are given the same one, each starts otherwise than those before it; `forkInit` names them. Default: the next stream of
   * `seedDefaultRandom`'s seed (0).
   */
  readonly random?: Random
  /** Standard deviation of normal initial weights. Default 0.02 (`initializer_range`); 0 draws nothing. */
  readonly deviation?: number
  /** Where the parameters live. Default: that of `setDefaultBackend`. */
  readonly backend?: Backend
  /** Store the weights of linear layers, embeddings and experts in fewer bits from the start, for inference. Default: f32. */
  readonly weights?: WeightFormat
}

/** The names of `InitOptions`, for those that extend them. @internal */
export const initNames: OptionNames<InitOptions> = { random: true, deviation: true, backend: true, weights: true }

let defaultSeed = 0
let defaultStreams = 0

/** Starts the random streams anew that modules without a generator of their own are initialized from, each from the next one. */
export function seedDefaultRandom(seed: number): void {
  defaultSeed = seed
  defaultStreams = 0
}

const generator = (init: InitOptions): Random => init.random ?? new Random(defaultSeed, ++defaultStreams)

/** How often each name was taken of a generator. */
const taken = new WeakMap<Random, Map<string, number>>()

/** The generator's fork of that name, and another one each time that the name comes again. */
function nextFork(init: InitOptions, name: string): Random {
  const random = generator(init)
  const counts = taken.get(random) ?? new Map<string, number>()
  const before = counts.get(name) ?? 0
  taken.set(random, counts.set(name, before + 1))
  return random.fork(before === 0 ? name : `${name}#${before}`)
}

/** A parameter of normal numbers, drawn from the generator's next fork of that name. */
export function normalParameter(shape: readonly number[], name: string, init: InitOptions = {}): Parameter {
  checkOptions('normalParameter', init, initNames)
  return weightParameter(shape, name, { ...init, weights: undefined })
}

/** A normal parameter that may be stored in fewer bits, as `weights` says: what `linear`, `groupedLinear` and `embeddingRows` take. */
export function weightParameter(shape: readonly number[], name: string, init: InitOptions = {}): Parameter {
  checkOptions('weightParameter', init, initNames)
  const { weights, deviation = 0.02, backend } = init
  const random = nextFork(init, name)
  const draws = pendingDraws()
  // Weights that a checkpoint replaces are not worth 0.1 µs each.
  if (deviation === 0 || draws !== null) {
    const parameter =
      weights === undefined
        ? new Parameter(zeros(shape, { backend }))
        : new QuantizedParameter(keep(scope(() => noGrad(() => zeroWeight(shape, weights, backend)))))
    if (deviation !== 0) draws?.push({ parameter, random, deviation })
    return parameter
  }
  const dense = new Parameter(randn(shape, random, { deviation, backend }))
  if (weights === undefined) return dense
  try {
    return quantizedParameter(dense, weights)
  } finally {
    dense.dispose()
  }
}

/** The same options for a child: an independent generator of its own, another one each time, also for the same name. */
export function forkInit(init: InitOptions, name: string): InitOptions {
  checkOptions('forkInit', init, initNames)
  return { ...init, random: nextFork(init, name) }
}

/** y = x W^T without bias. `weight [out, in]`, x `[..., in]` to `[..., out]`. */
export class Linear extends Module {
  /** `[out, in]`. */
  weight: Parameter
  override readonly quantizable = ['weight']

  /** Normal weights `[outputs, inputs]`. @throws MoeError E_CONFIG for an unknown option */
  constructor(inputs: number, outputs: number, init: InitOptions = {}) {
    super()
    checkOptions('Linear', init, initNames)
    this.weight = weightParameter([outputs, inputs], 'weight', init)
  }

  /** x `[..., in]` to `[..., out]`, in the precision of `withPrecision`. */
  forward(x: Tensor): Tensor {
    return linear(x, this.weight)
  }
}

/** The linear layer that makes logits: in bf16 where others are in fp8 (V3 report 3.3.1). */
export class OutputHead extends Linear {
  /** x `[..., in]` to logits `[..., out]`; in bf16 where fp8 is asked for. */
  override forward(x: Tensor): Tensor {
    return withPrecision(widePrecision(), () => super.forward(x))
  }
}

/** Rows of a table. `weight [rows, features]`, ids i32 `[...]` to `[..., features]`; an id outside the table gives zeros. */
export class Embedding extends Module {
  /** `[rows, features]`. */
  weight: Parameter
  override readonly quantizable = ['weight']

  /** A table of normal numbers. @throws MoeError E_CONFIG for an unknown option */
  constructor(rows: number, features: number, init: InitOptions = {}) {
    super()
    checkOptions('Embedding', init, initNames)
    this.weight = weightParameter([rows, features], 'weight', init)
  }

  /** ids i32 `[...]` to `[..., features]`. */
  forward(ids: Tensor): Tensor {
    return embeddingRows(this.weight, ids)
  }
}

/** RMSNorm over the last axis with a learned scale `weight [features]`. @throws MoeError E_CONFIG */
export class RmsNorm extends Module {
  /** `[features]`, 1 at first. */
  weight: Parameter
  /** Added to the mean square before the root. */
  readonly eps: number

  /** Of `features` numbers each. @throws MoeError E_CONFIG for an eps that is no number from 0 */
  constructor(features: number, eps = 1e-6, init: InitOptions = {}) {
    super()
    checkOptions('RmsNorm', init, initNames)
    if (!Number.isFinite(eps) || eps < 0) {
      const fix = 'pass a small number, such as 1e-6'
      throw new MoeError({ code: 'E_CONFIG', op: 'RmsNorm', problem: `eps = ${eps} is no number from 0`, fix })
    }
    this.weight = new Parameter(ones([features], { backend: init.backend }))
    this.eps = eps
  }

  /** x `[..., features]` to the same shape: x / sqrt(mean(x^2) + eps) * weight. */
  forward(x: Tensor): Tensor {
    return rmsNorm(x, this.weight, this.eps)
  }
}

/** Feed-forward net with gated activation: down(silu(gate(x)) * up(x)). */
export class SwigluMlp extends Module {
  /** `[hidden, features]`: what silu gates. */
  gate_proj: Linear
  /** `[hidden, features]`: what is gated. */
  up_proj: Linear
  /** `[features, hidden]`. */
  down_proj: Linear
  /** Make the gated activation again on the way back, in place of keeping it. May be changed between passes. Default false. */
  recompute = false

  /** A net of `features` in and out, `hidden` in between. @throws MoeError E_CONFIG for an unknown option */
  constructor(features: number, hidden: number, init: InitOptions = {}) {
    super()
    checkOptions('SwigluMlp', init, initNames)
    this.gate_proj = new Linear(features, hidden, forkInit(init, 'gate_proj'))
    this.up_proj = new Linear(features, hidden, forkInit(init, 'up_proj'))
    this.down_proj = new Linear(hidden, features, forkInit(init, 'down_proj'))
  }

  /** x `[..., features]` to the same shape. */
  forward(x: Tensor): Tensor {
    const through = this.recompute ? withRecomputed : withKept
    return through(
      (gate, up) => [swiglu(gate, up)],
      inner => this.down_proj.forward(inner),
      this.gate_proj.forward(x),
      this.up_proj.forward(x),
    )
  }
}
