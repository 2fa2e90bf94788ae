/** @file AdamW (Loshchilov & Hutter 2019) over the parameters of a model. */
import {
  adamwStep,
  checkOptions,
  MoeError,
  type NamedParameter,
  type OptionNames,
  type Parameter,
  type StateSource,
  sameShape,
  shown,
  showShape,
  type Tensor,
} from '@moe/core'
import {
  checkLearningRate,
  checkParameters,
  fillState,
  type OptimizerEntry,
  type OptimizerInputs,
  type StagedOptimizer,
  stateMismatch,
  zeroState,
} from './optimizer.ts'

/** Settings of AdamW; the learning rate comes with each step. */
export interface AdamWOptions {
  /** Decay rates of the two moments. Default [0.9, 0.95], as DeepSeek-V3. */
  readonly betas?: readonly [number, number]
  /** Default 1e-8. */
  readonly eps?: number
  /** Decoupled weight decay, of those parameters that `decays` says. Default 0.1. */
  readonly weightDecay?: number
  /** Whether a parameter's weights decay. Default `decaysMatrices`. */
  readonly decays?: (named: NamedParameter) => boolean
  /**
   * What both moments (Muon: its momentum, too) are stored as. Default f32. In `'bf16'`, as DeepSeek-V3 has them (report 3.3.3), they take half the memory; steps are computed in f32 and
   * taken before the moments are rounded. Needs rates of at most 1 - 2^-8.
   */
  readonly moments?: MomentDType
}

/** What an optimizer can store its moments as. */
export type MomentDType = 'f32' | 'bf16'

export const adamWNames: OptionNames<AdamWOptions> = {
  betas: true,
  eps: true,
  weightDecay: true,
  decays: true,
  moments: true,
}

/** One less half the distance of bf16 above 1: what is left of a moment after a step is rounded back to it where it decays by less. */
const slowestInBf16 = 1 - 2 ** -8

/** What is wrong with moments that are stored so, if anything is. `rates` are what is left of each after a step. */
export function momentsProblem(moments: MomentDType, rates: readonly number[]): string | undefined {
  if (moments !== 'f32' && moments !== 'bf16') return `moments is ${shown(moments)}, needs 'f32' or 'bf16'`
  const slow = moments === 'bf16' ? rates.find(rate => rate > slowestInBf16) : undefined
  if (slow === undefined) return undefined
  return `moments is 'bf16' and one keeps ${slow} of itself in a step: what loses less than 1 in 256 is rounded back to what it was in bf16, so that it would never fall; it needs at most ${slowestInBf16}`
}

/** @throws MoeError E_CONFIG */
export function checkMoments(op: string, moments: MomentDType, rates: readonly number[]): void {
  const problem = momentsProblem(moments, rates)
  if (problem === undefined) return
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem,
    fix: 'leave moments out, or let them decay faster, as { betas: [0.9, 0.95] }',
  })
}

/** Matrices decay; norms, biases and embedding tables do not. */
export function decaysMatrices({ name, parameter }: NamedParameter): boolean {
  return parameter.rank >= 2 && !/(^|\.)(embed_tokens|wte|embedding)\./.test(`${name}.`)
}

interface Slot {
  readonly named: NamedParameter
  readonly weightDecay: number
  readonly m: Parameter
  readonly v: Parameter
}

export class AdamW implements StagedOptimizer {
  readonly name = 'adamw'
  /** Steps done. */
  steps = 0
  /** Of the step that has begun. */
  #lr = 0
  readonly #slots: readonly Slot[]
  readonly #betas: readonly [number, number]
  readonly #eps: number
  readonly #weightDecay: number
  readonly #decays: (named: NamedParameter) => boolean
  readonly #moments: MomentDType

  /** Two moments, zeros, for each trainable parameter; others are left out. @throws MoeError E_CONFIG, E_UNSUPPORTED where the backend has no bf16 for the moments */
  constructor(parameters: readonly NamedParameter[], options: AdamWOptions = {}) {
    checkParameters('AdamW', parameters)
    checkOptions('AdamW', options, adamWNames)
    const { betas = [0.9, 0.95], eps = 1e-8, weightDecay = 0.1, decays = decaysMatrices, moments = 'f32' } = options
    checkMoments('AdamW', moments, betas)
    this.#betas = betas
    this.#eps = eps
    this.#weightDecay = weightDecay
    this.#decays = decays
    this.#moments = moments
    const trained = parameters.filter(({ parameter }) => parameter.trainable)
    const both = trained.flatMap(({ parameter }) => [parameter, parameter])
    const state = zeroState(both, moments)
    this.#slots = trained.map((named, i) => {
      return { named, weightDecay: decays(named) ? weightDecay : 0, m: state[2 * i], v: state[2 * i + 1] }
    })
  }

  settings(parameters: readonly NamedParameter[]): Readonly<Record<string, unknown>> {
    const decaying = parameters.filter(named => named.parameter.trainable && this.#decays(named)).length
    const [betas, eps, weightDecay] = [[...this.#betas], this.#eps, this.#weightDecay]
    const inFewerBits = this.#moments === 'f32' ? {} : { moments: this.#moments }
    return { betas, eps, weightDecay, decaying: weightDecay === 0 ? 0 : decaying, ...inFewerBits }
  }

  step(lr: number, gradScale: Tensor): void {
    this.begin(lr)
    this.update(null, gradScale)
  }

  get state(): readonly Tensor[] {
    return this.#slots.flatMap(({ m, v }) => [m, v])
  }

  begin(lr: number): OptimizerInputs {
    checkLearningRate('AdamW', lr)
    const step = ++this.steps
    this.#lr = lr
    return { numbers: new Float32Array(), updates: { adamwStep: attrs => ({ ...attrs, lr, step }) } }
  }

  update(_numbers: Tensor | null, gradScale: Tensor): void {
    const [beta1, beta2] = this.#betas
    for (const { named, weightDecay, m, v } of this.#slots) {
      const { parameter } = named
      if (parameter.grad === null) continue
      const attrs = { lr: this.#lr, beta1, beta2, eps: this.#eps, weightDecay, step: this.steps }
      const next = adamwStep(parameter, parameter.grad, m, v, gradScale, attrs)
      parameter.assign(next.param)
      m.assign(next.m)
      v.assign(next.v)
    }
  }

  entries(): OptimizerEntry[] {
    return this.#tensors().map(([name, tensor, parameter]) => ({
      name,
      parameter,
      dtype: tensor.dtype,
      shape: tensor.shape,
      data: () => tensor.data(),
    }))
  }

  async load(source: StateSource, steps: number): Promise<void> {
    const own = this.#tensors()
    const stored = new Set(source.keys())
    const problems: string[] = []
    for (const [name, { shape }] of own) {
      if (!stored.delete(name)) problems.push(`${name} is missing`)
      else if (!sameShape(source.info(name).shape, shape)) {
        problems.push(`${name} is stored as ${showShape(source.info(name).shape)}, needs ${showShape(shape)}`)
      }
    }
    for (const name of stored) problems.push(`${name} is unexpected`)
    if (problems.length > 0) throw stateMismatch('AdamW.load', problems)
    for (const [name, tensor] of own) await fillState(tensor, source, name)
    this.steps = steps
  }

  dispose(): void {
    for (const { m, v } of this.#slots) {
      m.dispose()
      v.dispose()
    }
  }

  #tensors(): Array<[name: string, state: Parameter, of: Parameter]> {
    return this.#slots.flatMap(
      ({ named: { name, parameter }, m, v }): Array<[string, Parameter, Parameter]> => [
        [`m.${name}`, m, parameter],
        [`v.${name}`, v, parameter],
      ],
    )
  }
}
