/**
 * @file Muon: orthogonalized momentum (Jordan et al. 2024), with updates scaled to the size of AdamW's (Liu et al.
 *   2025, arXiv 2502.16982).
 */
import {
  checkOptions,
  checkPrecision,
  isTokenTable,
  type LocalParameter,
  MoeError,
  type NamedParameter,
  noGrad,
  type OptionNames,
  type Parameter,
  type Precision,
  type StateSource,
  sameShape,
  scope,
  shown,
  showShape,
  type Tensor,
  tensor,
} from '@moe/core'
import { AdamW, type AdamWOptions, adamWNames, checkMoments, decaysMatrices } from './adamw.ts'
import {
  checkParameters,
  fillState,
  type OptimizerEntry,
  type OptimizerInputs,
  type StagedOptimizer,
  stateMismatch,
  zeroState,
} from './optimizer.ts'

/** Settings of Muon, and of the AdamW that updates the other parameters. */
export interface MuonOptions extends AdamWOptions {
  /** Momentum. Default 0.95. */
  readonly momentum?: number | undefined
  /** Newton-Schulz iterations. Default 5. */
  readonly iterations?: number | undefined
  /** Precision of these iterations. Default bf16, as usual for Muon. */
  readonly precision?: Precision | undefined
  /** Selects the parameters that Muon updates; AdamW updates the others. Default `hiddenMatrices`. */
  readonly filter?: ((named: NamedParameter) => boolean) | undefined
}

const names: OptionNames<MuonOptions> = {
  ...adamWNames,
  momentum: true,
  iterations: true,
  precision: true,
  filter: true,
}

/** Selects matrices and stacks of matrices, except embedding table and head. */
export function hiddenMatrices(named: NamedParameter): boolean {
  return named.parameter.rank >= 2 && named.parameter.rank <= 3 && !isTokenTable(named)
}

/**
 * Replaces matrices `[..., m, n]` by nearly orthogonal ones with the same singular vectors (singular values 0.7 to
 * 1.2), by Newton-Schulz iteration with the quintic polynomial of Jordan et al. Not differentiable.
 */
export function orthogonalize(x: Tensor, iterations = 5, precision: Precision = 'bf16'): Tensor {
  const [a, b, c] = [3.4445, -4.775, 2.0315]
  const [rows, columns] = x.shape.slice(-2)
  // Uses the smaller of the two Gram matrices, and multiplies from its side.
  const left = rows <= columns
  const next = (y: Tensor) => {
    const gram = y.matmul(y, left ? { transposeB: true, precision } : { transposeA: true, precision })
    const factor = gram.mul(b).add(gram.matmul(gram, { precision }).mul(c))
    return y.mul(a).add(left ? factor.matmul(y, { precision }) : y.matmul(factor, { precision }))
  }
  return noGrad(() => {
    let y = scope(() => x.div(x.mul(x).sum([-2, -1], true).sqrt().add(1e-7)))
    for (let i = 0; i < iterations; i++) {
      // Each iteration frees its intermediate results: a stack of experts is large.
      const before = y
      y = scope(() => next(before))
      before.dispose()
    }
    return y
  })
}

/** Muon orthogonalizes complete matrices, so it cannot update a shard of one. @throws MoeError E_CONFIG */
function checkComplete({ name, parameter, firstRow }: LocalParameter): void {
  if (firstRow === undefined || parameter.rank > 2) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'Muon',
    problem: `filter selects ${name}, but this rank has only some of its rows`,
    fix: 'exclude embedding tables and heads, as hiddenMatrices does',
  })
}

/** @throws MoeError E_CONFIG */
function checkMomentum(momentum: number, iterations: number): void {
  const problems: string[] = []
  if (!(typeof momentum === 'number' && momentum >= 0 && momentum < 1))
    problems.push(`momentum is ${shown(momentum)}, expected a number of at least 0 and below 1`)
  if (!(Number.isSafeInteger(iterations) && iterations >= 1))
    problems.push(`iterations is ${shown(iterations)}, expected an integer of at least 1`)
  if (problems.length === 0) return
  const fix = 'change these options, or omit them'
  throw new MoeError({ code: 'E_CONFIG', op: 'Muon', problem: problems.join('; '), fix, details: { problems } })
}

interface Slot {
  readonly named: NamedParameter
  readonly weightDecay: number
  /** Scale of the update: 0.2 sqrt(max(m, n)) matches the root mean square of AdamW's updates. */
  readonly scale: number
  readonly momentum: Parameter
}

/** Muon for the hidden matrices, AdamW for everything else, with one learning rate and weight decay. */
export class Muon implements StagedOptimizer {
  readonly name = 'muon'
  readonly #slots: readonly Slot[]
  readonly #rest: AdamW
  readonly #momentum: number
  readonly #iterations: number
  readonly #precision: Precision
  readonly #decays: (named: NamedParameter) => boolean
  readonly #trainedByMuon: (named: NamedParameter) => boolean

  /**
   * @param parameters of the model, as `namedParameters` returns them, or those of this rank
   * @throws MoeError E_CONFIG for invalid settings, and if `filter` selects a matrix of which this rank has only some
   *   rows
   */
  constructor(parameters: readonly LocalParameter[], options: MuonOptions = {}) {
    checkParameters('Muon', parameters)
    checkOptions('Muon', options, names)
    const { momentum = 0.95, iterations = 5, precision = 'bf16', filter = hiddenMatrices, ...others } = options
    checkPrecision('Muon', precision)
    const { weightDecay = 0.1, decays = decaysMatrices, moments = 'f32' } = others
    checkMomentum(momentum, iterations)
    checkMoments('Muon', moments, [momentum])
    this.#decays = decays
    this.#trainedByMuon = named => named.parameter.trainable && filter(named)
    const own = parameters.filter(this.#trainedByMuon)
    for (const named of own) checkComplete(named)
    const momenta = zeroState(
      own.map(({ parameter }) => parameter),
      moments,
    )
    this.#slots = own.map((named, i) => ({
      named,
      weightDecay: decays(named) ? weightDecay : 0,
      scale: 0.2 * Math.sqrt(Math.max(...named.parameter.shape.slice(-2))),
      momentum: momenta[i],
    }))
    try {
      this.#rest = new AdamW(
        parameters.filter(named => !own.includes(named)),
        others,
      )
    } catch (error) {
      for (const momentum of momenta) momentum.dispose()
      throw error
    }
    this.#momentum = momentum
    this.#iterations = iterations
    this.#precision = precision
  }

  settings(parameters: readonly NamedParameter[]): Readonly<Record<string, unknown>> {
    const own = parameters.filter(this.#trainedByMuon)
    const rest = parameters.filter(named => !own.includes(named))
    const [momentum, iterations, precision] = [this.#momentum, this.#iterations, this.#precision]
    const decaying = own.filter(this.#decays).length
    return {
      ...{ momentum, iterations, precision, matrices: own.length },
      // Omitted if all decay, as in earlier checkpoints.
      ...(decaying < own.length && { decaying }),
      adamw: this.#rest.settings(rest),
    }
  }

  step(lr: number, gradScale: Tensor): void {
    const { numbers } = this.begin(lr)
    const uploaded = tensor(numbers, undefined, gradScale)
    this.update(uploaded, gradScale)
    uploaded.dispose()
  }

  get state(): readonly Tensor[] {
    return [...this.#slots.map(({ momentum }) => momentum), ...this.#rest.state]
  }

  /** Returns two numbers per matrix: the factor of its weight decay, and the scale of its update. */
  begin(lr: number): OptimizerInputs {
    const numbers = this.#slots.flatMap(({ weightDecay, scale }) => [1 - lr * weightDecay, lr * scale])
    return { numbers: Float32Array.from(numbers), updates: this.#rest.begin(lr).updates }
  }

  update(numbers: Tensor, gradScale: Tensor): void {
    for (const [i, { named, momentum }] of this.#slots.entries()) {
      const { parameter } = named
      const { grad } = parameter
      if (grad === null) continue
      const next = scope(() =>
        noGrad(() => {
          const number = (at: number) => numbers.narrow(0, at, at + 1).reshape([])
          const g = grad.mul(gradScale).mul(1 - this.#momentum)
          const average = momentum.cast('f32').mul(this.#momentum).add(g)
          // Nesterov momentum: one step ahead.
          const ahead = average.mul(this.#momentum).add(g)
          const update = orthogonalize(ahead, this.#iterations, this.#precision).mul(number(2 * i + 1))
          return { parameter: parameter.mul(number(2 * i)).sub(update), average: average.cast(momentum.dtype) }
        }),
      )
      parameter.assign(next.parameter)
      momentum.assign(next.average)
    }
    this.#rest.update(null, gradScale)
  }

  entries(): OptimizerEntry[] {
    const own = this.#slots.map(({ named, momentum }) => ({
      name: `momentum.${named.name}`,
      parameter: named.parameter,
      dtype: momentum.dtype,
      shape: momentum.shape,
      data: () => momentum.data(),
    }))
    return [...own, ...this.#rest.entries()]
  }

  async load(source: StateSource, steps: number): Promise<void> {
    const stored = new Set(source.keys())
    const problems: string[] = []
    for (const { named, momentum } of this.#slots) {
      const name = `momentum.${named.name}`
      if (!stored.delete(name)) problems.push(`${name} is missing`)
      else if (!sameShape(source.info(name).shape, momentum.shape)) {
        problems.push(
          `${name} is stored as ${showShape(source.info(name).shape)}, expected ${showShape(momentum.shape)}`,
        )
      }
    }
    if (problems.length > 0) throw stateMismatch('Muon.load', problems)
    await this.#rest.load(
      { keys: () => stored, info: name => source.info(name), read: name => source.read(name) },
      steps,
    )
    for (const { named, momentum } of this.#slots) await fillState(momentum, source, `momentum.${named.name}`)
  }

  dispose(): void {
    for (const { momentum } of this.#slots) momentum.dispose()
    this.#rest.dispose()
  }
}
