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

/** Settings of AdamW. The learning rate is passed to each step. */
export interface AdamWOptions {
  /** Decay rates of the first and second moment. Default [0.9, 0.95], as in DeepSeek-V3. */
  readonly betas?: readonly [number, number] | undefined
  /** Added to the denominator of the update. Default 1e-8. */
  readonly eps?: number | undefined
  /** Decoupled weight decay of the parameters that `decays` selects. Default 0.1. */
  readonly weightDecay?: number | undefined
  /** Whether weight decay applies to a parameter. Default `decaysMatrices`. */
  readonly decays?: ((named: NamedParameter) => boolean) | undefined
  /**
   * Storage of both moments (for Muon, also of the momentum). Default f32. `'bf16'`, which DeepSeek-V3 uses (report,
   * 3.3.3), takes half the memory. Steps are computed in f32, and the moments are rounded afterwards. Needs decay rates
   * of at most 1 - 2^-8.
   */
  readonly moments?: MomentDType | undefined
}

/** Storage types for optimizer moments. */
export type MomentDType = 'f32' | 'bf16'

export const adamWNames: OptionNames<AdamWOptions> = {
  betas: true,
  eps: true,
  weightDecay: true,
  decays: true,
  moments: true,
}

/** 1 minus half the spacing of bf16 above 1. A moment that decays more slowly is rounded back to its previous value. */
const slowestInBf16 = 1 - 2 ** -8

/** The problem with such moments, if there is one. @param rates factors by which moments decay in each step */
export function momentsProblem(moments: MomentDType, rates: readonly number[]): string | undefined {
  if (moments !== 'f32' && moments !== 'bf16') return `moments is ${shown(moments)}, expected 'f32' or 'bf16'`
  const slow = moments === 'bf16' ? rates.find(rate => rate > slowestInBf16) : undefined
  if (slow === undefined) return undefined
  return `moments is 'bf16', but a moment has a decay rate of ${slow}: in bf16, a change of less than 1/256 is rounded away and the moment would never decay; use a rate of at most ${slowestInBf16}`
}

/** @throws MoeError E_CONFIG */
export function checkMoments(op: string, moments: MomentDType, rates: readonly number[]): void {
  const problem = momentsProblem(moments, rates)
  if (problem === undefined) return
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem,
    fix: 'omit moments, or use lower decay rates such as { betas: [0.9, 0.95] }',
  })
}

/** The problems with other settings of AdamW. */
export function adamWProblems({ betas = [0, 0], eps = 1, weightDecay = 0 }: AdamWOptions): string[] {
  const isDecayRate = (value: unknown) => typeof value === 'number' && value >= 0 && value < 1
  const problems: string[] = []
  if (!Array.isArray(betas) || betas.length !== 2 || !betas.every(isDecayRate))
    problems.push(`betas is ${shown(betas)}, expected two numbers of at least 0 and below 1`)
  if (!(Number.isFinite(eps) && eps > 0)) problems.push(`eps is ${shown(eps)}, expected a positive number`)
  if (!(Number.isFinite(weightDecay) && weightDecay >= 0))
    problems.push(`weightDecay is ${shown(weightDecay)}, expected a number of at least 0`)
  return problems
}

/** @throws MoeError E_CONFIG */
function checkSettings(options: AdamWOptions): void {
  const problems = adamWProblems(options)
  if (problems.length === 0) return
  const fix = 'change these options, or omit them'
  throw new MoeError({ code: 'E_CONFIG', op: 'AdamW', problem: problems.join('; '), fix, details: { problems } })
}

/** Selects the parameters with weight decay: matrices, but not norms, biases and embedding tables. */
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
  /** Learning rate of the current step. */
  #lr = 0
  readonly #slots: readonly Slot[]
  readonly #betas: readonly [number, number]
  readonly #eps: number
  readonly #weightDecay: number
  readonly #decays: (named: NamedParameter) => boolean
  readonly #moments: MomentDType

  /**
   * Creates two zero moments for each trainable parameter; others are ignored.
   *
   * @throws MoeError E_CONFIG for invalid settings
   * @throws MoeError E_UNSUPPORTED if the backend cannot store the moments as bf16
   */
  constructor(parameters: readonly NamedParameter[], options: AdamWOptions = {}) {
    checkParameters('AdamW', parameters)
    checkOptions('AdamW', options, adamWNames)
    const { betas = [0.9, 0.95], eps = 1e-8, weightDecay = 0.1, decays = decaysMatrices, moments = 'f32' } = options
    checkSettings(options)
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
        problems.push(`${name} is stored as ${showShape(source.info(name).shape)}, expected ${showShape(shape)}`)
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
