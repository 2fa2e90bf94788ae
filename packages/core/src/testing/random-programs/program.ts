/** @file Random programs: how one is drawn, and how it runs on a backend, in several ways that must agree. */
import { backward, gradients } from '../../autograd/backward.ts'
import { backwardInput } from '../../autograd/split.ts'
import type { Backend } from '../../backend.ts'
import { fromHost, tensor } from '../../create.ts'
import { type DType, encodeHost } from '../../dtype.ts'
import type { Precision } from '../../ops.ts'
import { Parameter } from '../../parameter.ts'
import { withPrecision } from '../../precision.ts'
import { Random } from '../../random.ts'
import { scope } from '../../scope.ts'
import { type Shape, sizeOf } from '../../shape.ts'
import type { Tensor } from '../../tensor.ts'
import type { StepContext } from './choices.ts'
import { coarse, nesting, type StepKind, steps } from './steps.ts'

/** A step of a program. Everything that it chooses follows from its seed and from the shapes of its inputs. */
export interface Step {
  readonly kind: StepKind
  readonly seed: number
  /** Steps that it runs itself. */
  readonly body?: readonly Step[]
}

/** A program. */
export interface Program {
  /** Precision of matrix products. */
  readonly precision: Precision
  readonly steps: readonly Step[]
}

/** Draws a program. One in four may round values to less than f32. */
export function randomProgram(seed: number): Program {
  const random = new Random(seed)
  const isCoarse = random.integer(4) === 0
  const kinds = (Object.keys(steps) as StepKind[]).filter(kind => isCoarse || !coarse.has(kind))
  const draw = (count: number, depth: number): Step[] =>
    Array.from({ length: count }, () => {
      const kind = kinds[random.integer(kinds.length)]
      const step = { kind, seed: random.integer(2 ** 31) }
      if (!nesting.has(kind)) return step
      return { ...step, body: depth === 2 ? [] : draw(1 + random.integer(4), depth + 1) }
    })
  const leaf = (): Step => ({ kind: 'leaf', seed: random.integer(2 ** 31) })
  const precisions = isCoarse ? (['f32', 'bf16', 'bf16', 'fp8'] as const) : (['f32'] as const)
  return {
    precision: precisions[random.integer(precisions.length)],
    steps: [leaf(), leaf(), ...draw(1 + random.integer(10), 0)],
  }
}

/** How to compute the gradients. `direct`: without recomputation. `retained`: in a second backward pass. */
export type Way = 'backward' | 'direct' | 'gradients' | 'retained' | 'split'

/** The results of a program. */
export interface StepResult {
  /** All tensors of the program, detached. */
  readonly outputs: Tensor[]
  /** The gradients of all parameters, in the order of their creation. */
  readonly gradients: Array<Tensor | null>
}

/** The largest number of elements of a tensor that later steps may read. */
const maxResult = 20_000

/** A program on a backend, with its parameters and constants. */
export class ProgramRun {
  readonly #program: Program
  readonly #backend: Backend
  readonly #dtypes: ReadonlySet<DType>
  /** Parameters and constants, by the step that created them. */
  readonly #leaves = new Map<string, Tensor>()

  /** @param dtypes element types that the program may use. Default: all that the backend supports. */
  constructor(program: Program, backend: Backend, dtypes = backend.dtypes) {
    this.#program = program
    this.#backend = backend
    this.#dtypes = dtypes
  }

  /** The parameters that were created so far. */
  get parameters(): Parameter[] {
    return [...this.#leaves.values()].filter((leaf): leaf is Parameter => leaf instanceof Parameter && leaf.trainable)
  }

  /** Runs the program. Returns its results that have a gradient, and the gradient of the loss with respect to each. */
  forward(options: { recompute?: boolean } = {}): { outputs: Tensor[]; tracked: Tensor[]; weights: Tensor[] } {
    const { precision, steps: all } = this.#program
    const { recompute = true } = options
    const results = withPrecision(precision, () => this.#run(all, { inputs: [], outside: [], path: '', recompute }))
    const tracked = results.filter(result => result.tracked)
    const weights = results.flatMap((result, i) =>
      result.tracked ? [tensor(new Random(i + 1).normal(result.size), result.shape, { backend: this.#backend })] : [],
    )
    return { outputs: results.map(result => result.detach()), tracked, weights }
  }

  /** Runs the program and returns the loss, the sum of all tracked results times their weights; null without any. */
  loss(options: { recompute?: boolean } = {}): { outputs: Tensor[]; loss: Tensor | null } {
    const { outputs, tracked, weights } = this.forward(options)
    const [first, ...others] = tracked.map((result, i) => result.mul(weights[i]).sum())
    return { outputs, loss: first ? others.reduce((sum, part) => sum.add(part), first) : null }
  }

  /** Runs the program and its backward pass. */
  step(way: Way = 'backward'): StepResult {
    return scope(() => (way === 'split' ? this.#splitStep() : this.#step(way)))
  }

  /** Frees parameters and constants. */
  dispose(): void {
    for (const leaf of this.#leaves.values()) leaf.dispose()
    this.#leaves.clear()
  }

  #step(way: Exclude<Way, 'split'>): StepResult {
    const { outputs, loss } = this.loss({ recompute: way !== 'direct' })
    const { parameters } = this
    if (loss === null) return { outputs, gradients: parameters.map(() => null) }
    if (way === 'gradients') return { outputs, gradients: gradients(loss, parameters) }
    if (way === 'retained') {
      backward(loss, { retainGraph: true })
      for (const parameter of parameters) parameter.zeroGrad()
    }
    backward(loss)
    return { outputs, gradients: parameters.map(takeGradient) }
  }

  /** As a stage of a pipeline, with an input in place of the first parameter, and all results as outputs. */
  #splitStep(): StepResult {
    scope(() => void this.forward())
    const first = [...this.#leaves].find(([, leaf]) => leaf.tracked)
    if (first === undefined) return this.#step('backward')
    const [name, parameter] = first
    const input = parameter.detach()
    input.tracked = true
    this.#leaves.set(name, input)
    const { outputs, tracked, weights } = this.forward()
    this.#leaves.set(name, parameter)
    const { parameters } = this
    if (tracked.length === 0) return { outputs, gradients: parameters.map(() => null) }
    const { gradients: ofInputs, backwardWeight } = backwardInput(tracked, [input], weights)
    backwardWeight()
    return { outputs, gradients: parameters.map(own => (own === parameter ? ofInputs[0] : takeGradient(own))) }
  }

  /** Returns the results of all steps. They may read `inputs` and, less often, `outside`. */
  #run(all: readonly Step[], { inputs, outside, path, recompute }: Surroundings): Tensor[] {
    const results: Tensor[] = []
    for (const { kind, seed, body = [] } of all) {
      const random = new Random(seed)
      const readable = [...inputs, ...results]
      const key = `${path}/${seed}`
      let created = 0
      const leaf = (shape: Shape, make: (stream: Random) => Tensor) => {
        const name = `${key}:${created++}:${shape}`
        const known = this.#leaves.get(name) ?? make(new Random(seed).fork(created))
        this.#leaves.set(name, known)
        return known
      }
      const context: StepContext = {
        random,
        recompute,
        dtypes: this.#dtypes,
        pick() {
          if (outside.length > 0 && random.integer(4) === 0) return outside[random.integer(outside.length)]
          if (readable.length === 0) return context.parameter([3, 4])
          // More often one of the latest.
          const back = Math.min(random.integer(readable.length), random.integer(readable.length))
          return readable[readable.length - 1 - back]
        },
        parameter: shape =>
          leaf(shape, stream => new Parameter(fromHost(stream.normal(sizeOf(shape)), shape, 'f32', this.#backend))),
        integers: (shape, low, high) =>
          leaf(shape, stream => {
            const values = Array.from({ length: sizeOf(shape) }, () => low + stream.integer(high - low))
            const constant = fromHost(encodeHost('i32', values), shape, 'i32', this.#backend)
            return new Parameter(constant, { trainable: false })
          }),
        body: own => this.#run(body, { inputs: own, outside: readable, path: key, recompute }),
      }
      const made = steps[kind](context)
      for (const result of (Array.isArray(made) ? made : [made]) as readonly Tensor[]) {
        if (result.size <= maxResult) results.push(result)
      }
    }
    return results
  }
}

interface Surroundings {
  readonly inputs: readonly Tensor[]
  readonly outside: readonly Tensor[]
  /** The steps around, as a prefix of the names of leaves. */
  readonly path: string
  readonly recompute: boolean
}

function takeGradient(parameter: Parameter): Tensor | null {
  const { grad } = parameter
  parameter.grad = null
  return grad
}
