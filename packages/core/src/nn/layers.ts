/** @file The basic layers (linear, embedding, RMSNorm, SwiGLU MLP) and their initialization. */
import { withKept, withRecomputed } from '../autograd/checkpoint.ts'
import type { Backend } from '../backend.ts'
import { checkBackend, needDtype, needSizes, needTensor } from '../checks.ts'
import { ones, randn, zeros } from '../create.ts'
import { describe, MoeError, shown } from '../errors.ts'
import { checkFormat, zeroWeight } from '../fused/quantized-matmul.ts'
import { rmsNorm } from '../fused/rms-norm.ts'
import { swiglu } from '../fused/swiglu.ts'
import type { WeightFormat } from '../ops.ts'
import { checkOptions, type OptionNames } from '../options.ts'
import { Parameter } from '../parameter.ts'
import { widePrecision, withPrecision } from '../precision.ts'
import { Random } from '../random.ts'
import { keep, scope } from '../scope.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { deferredParameters, drawnRows } from './defer-weights.ts'
import { Module } from './module.ts'
import { embeddingRows, linear, QuantizedParameter, quantizedParameter } from './quantized.ts'

/** How the parameters of a module are initialized. */
export interface InitOptions {
  /**
   * Source of the initial weights; the same seed gives the same weights on every backend. Each parameter has its own
   * stream, identified by its name, so weights do not depend on what else is created, and the generator itself does not
   * advance. If several modules of one kind get the same generator, each starts with different weights; use `forkInit`
   * to name them. Default: the next stream of the seed set by `seedDefaultRandom` (0).
   */
  readonly random?: Random | undefined
  /**
   * Standard deviation of the normally distributed initial weights. Default 0.02 (`initializer_range`); 0 creates zeros
   * without drawing numbers.
   */
  readonly std?: number | undefined
  /** Where the parameters are stored. Default: the backend set by `setDefaultBackend`. */
  readonly backend?: Backend | undefined
  /** Quantizes the weights of linear layers, embeddings and experts from the start, for inference. Default: f32. */
  readonly weights?: WeightFormat | undefined
}

/** The names of `InitOptions`, for options that extend them. @internal */
export const initNames: OptionNames<InitOptions> = { random: true, std: true, backend: true, weights: true }

function configError(op: string, problem: string, fix: string): MoeError {
  return new MoeError({ code: 'E_CONFIG', op, problem, fix })
}

function checkInit(op: string, init: InitOptions): void {
  checkOptions(op, init, initNames)
  const { std, random, backend, weights } = init
  if (std !== undefined && !(Number.isFinite(std) && std >= 0)) {
    throw configError(op, `std is ${shown(std)}, expected a number of at least 0`, 'pass a small number, such as 0.02')
  }
  if (random !== undefined && typeof random?.fork !== 'function') {
    throw configError(op, `random is ${describe(random)}, not a generator`, 'pass { random: new Random(seed) }')
  }
  if (backend !== undefined) checkBackend(op, backend)
  if (weights !== undefined) checkFormat(op, weights)
}

/** Checks the arguments of a layer's constructor. @throws MoeError E_CONFIG, E_ATTR */
function checkLayer(op: string, sizes: Readonly<Record<string, number>>, init: InitOptions): void {
  for (const [name, size] of Object.entries(sizes)) {
    if (Number.isInteger(size) && size >= 1) continue
    const call = `new ${op}(${Object.keys(sizes).join(', ')})`
    throw configError(op, `${name} is ${shown(size)}, expected a positive integer`, `pass sizes: ${call}`)
  }
  checkInit(op, init)
}

let defaultSeed = 0
let defaultStreams = 0

/**
 * Sets the seed for modules that are created without a generator, and restarts their random streams. Each such module
 * uses the next stream.
 */
export function seedDefaultRandom(seed: number): void {
  defaultSeed = new Random(seed).seed
  defaultStreams = 0
}

const generator = (init: InitOptions): Random => init.random ?? new Random(defaultSeed, ++defaultStreams)

/** How often each name was forked from a generator. */
const forkCounts = new WeakMap<Random, Map<string, number>>()

/** Returns the generator's fork of that name, and a different one each time the name is used again. */
function nextFork(init: InitOptions, name: string): Random {
  const random = generator(init)
  const counts = forkCounts.get(random) ?? new Map<string, number>()
  const before = counts.get(name) ?? 0
  forkCounts.set(random, counts.set(name, before + 1))
  return random.fork(before === 0 ? name : `${name}#${before}`)
}

/** Creates a parameter of normally distributed numbers from the generator's next fork of that name. */
export function normalParameter(shape: readonly number[], name: string, init: InitOptions = {}): Parameter {
  needSizes('normalParameter', shape)
  checkInit('normalParameter', init)
  return weightParameter(shape, name, { ...init, weights: undefined })
}

/**
 * Like `normalParameter`, but quantized if `weights` is set. The result is for `linear`, `groupedLinear` and embedding
 * tables.
 */
export function weightParameter(shape: readonly number[], name: string, init: InitOptions = {}): Parameter {
  needSizes('weightParameter', shape)
  checkInit('weightParameter', init)
  const { weights, std = 0.02, backend } = init
  const random = nextFork(init, name)
  const deferred = deferredParameters()
  const zeroQuantized = (format: WeightFormat) =>
    new QuantizedParameter(keep(scope(() => noGrad(() => zeroWeight(shape, format, backend)))))
  if (deferred !== null) {
    const parameter =
      weights === undefined
        ? Parameter.withoutMemory(shape, { dtype: 'f32', backend })
        : QuantizedParameter.unallocated(shape, weights, backend)
    parameter.elsewhere = drawnRows(shape, random, std)
    deferred.push(parameter)
    return parameter
  }
  // Weights that a checkpoint will replace are not worth drawing, at 0.1 µs each.
  if (std === 0) return weights === undefined ? new Parameter(zeros(shape, { backend })) : zeroQuantized(weights)
  const dense = new Parameter(randn(shape, random, { std, backend }))
  if (weights === undefined) return dense
  try {
    return quantizedParameter(dense, weights)
  } finally {
    dense.dispose()
  }
}

/**
 * Returns the same options for a child module, with an independent generator, which is different each time, even for
 * the same name.
 */
export function forkInit(init: InitOptions, name: string): InitOptions {
  checkInit('forkInit', init)
  return { ...init, random: nextFork(init, name) }
}

/** Linear layer without bias: y = x W^T. Maps x `[..., in]` to `[..., out]` with `weight [out, in]`. */
export class Linear extends Module {
  /** `[out, in]`. */
  weight: Parameter
  override readonly quantizable = ['weight']

  /** Creates normally distributed weights `[outputs, inputs]`. @throws MoeError E_CONFIG for an invalid size or option */
  constructor(inputs: number, outputs: number, init: InitOptions = {}) {
    super()
    checkLayer('Linear', { inputs, outputs }, init)
    this.weight = weightParameter([outputs, inputs], 'weight', init)
  }

  /** Maps x `[..., in]` to `[..., out]`, in the precision of `withPrecision`. */
  forward(x: Tensor): Tensor {
    return linear(x, this.weight)
  }
}

/** The linear layer that computes logits. Runs in bf16 when other layers run in fp8 (V3 report 3.3.1). */
export class OutputHead extends Linear {
  /** Maps x `[..., in]` to logits `[..., out]`, in the precision of `withPrecision`, with bf16 instead of fp8. */
  override forward(x: Tensor): Tensor {
    return withPrecision(widePrecision(), () => super.forward(x))
  }
}

/**
 * Table lookup: `weight [rows, features]`, ids i32 `[...]` to `[..., features]`. An id outside the table gives zeros.
 */
export class Embedding extends Module {
  /** `[rows, features]`. */
  weight: Parameter
  override readonly quantizable = ['weight']

  /** Creates a table of normally distributed numbers. @throws MoeError E_CONFIG for an invalid size or option */
  constructor(rows: number, features: number, init: InitOptions = {}) {
    super()
    checkLayer('Embedding', { rows, features }, init)
    this.weight = weightParameter([rows, features], 'weight', init)
  }

  /** Maps ids i32 `[...]` to `[..., features]`. */
  forward(ids: Tensor): Tensor {
    needTensor('Embedding', 'ids', ids)
    needDtype('Embedding', 'ids', ids, 'i32')
    return embeddingRows(this.weight, ids)
  }
}

/** RMSNorm over the last axis with a learned scale `weight [features]`. */
export class RmsNorm extends Module {
  /** `[features]`, initially 1. */
  weight: Parameter
  /** Added to the mean square before the square root. */
  readonly eps: number

  /** Creates a norm over `features` features. @throws MoeError E_CONFIG for an invalid size, `eps` or option */
  constructor(features: number, eps = 1e-6, init: InitOptions = {}) {
    super()
    checkLayer('RmsNorm', { features }, init)
    if (!Number.isFinite(eps) || eps < 0) {
      const problem = `eps is ${shown(eps)}, expected a number of at least 0`
      throw configError('RmsNorm', problem, 'pass a small number, such as 1e-6')
    }
    this.weight = new Parameter(ones([features], { backend: init.backend }))
    this.eps = eps
  }

  /** Maps x `[..., features]` to the same shape: x / sqrt(mean(x^2) + eps) * weight. */
  forward(x: Tensor): Tensor {
    return rmsNorm(x, this.weight, this.eps)
  }
}

/** Feed-forward network with gated activation: down(silu(gate(x)) * up(x)). */
export class SwigluMlp extends Module {
  /** `[hidden, features]`: the projection that goes through silu. */
  gate_proj: Linear
  /** `[hidden, features]`: the projection that is gated. */
  up_proj: Linear
  /** `[features, hidden]`. */
  down_proj: Linear
  /**
   * Recomputes the gated activation in the backward pass instead of keeping it. May be changed between passes. Default
   * false.
   */
  recompute = false

  /**
   * Creates a network with `features` inputs and outputs and `hidden` features in between.
   * @throws MoeError E_CONFIG for an invalid size or option
   */
  constructor(features: number, hidden: number, init: InitOptions = {}) {
    super()
    checkLayer('SwigluMlp', { features, hidden }, init)
    this.gate_proj = new Linear(features, hidden, forkInit(init, 'gate_proj'))
    this.up_proj = new Linear(features, hidden, forkInit(init, 'up_proj'))
    this.down_proj = new Linear(hidden, features, forkInit(init, 'down_proj'))
  }

  /** Maps x `[..., features]` to the same shape. */
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
