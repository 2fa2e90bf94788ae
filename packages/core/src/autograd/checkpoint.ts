/**
 * @file Recomputation: forward passes that run again during the backward pass, instead of keeping their activations.
 */
import { context, noGrad, withPrecision } from '../context.ts'
import { full } from '../create.ts'
import { needFunction } from '../errors.ts'
import { needTensor } from '../need-tensor.ts'
import { Lifetime, scope } from '../scope.ts'
import { record, type Tensor } from '../tensor.ts'
import { restore, useAndDiscard } from './discarded.ts'

/** Where a backward walk continues inside a second run. */
interface InnerWalk {
  /** Stand-ins for the inputs. */
  readonly leaves: readonly Tensor[]
  /** Outputs for which a gradient has arrived; `seeds` are these gradients. */
  readonly roots: readonly Tensor[]
  readonly seeds: ReadonlyArray<Tensor | null>
}

/** Runs a function a second time, with recording on, at most once until `dispose`. Internal. */
export class SecondRun {
  readonly #inputs: readonly Tensor[]
  readonly #fn: (inputs: readonly Tensor[]) => readonly Tensor[]
  readonly #life = new Lifetime()
  #made: { readonly leaves: readonly Tensor[]; readonly outputs: readonly Tensor[] } | null = null

  constructor(inputs: readonly Tensor[], fn: (inputs: readonly Tensor[]) => readonly Tensor[]) {
    this.#inputs = inputs
    this.#fn = fn
  }

  /** The outputs of the second run. */
  get outputs(): readonly Tensor[] {
    return this.#run().outputs
  }

  startingFrom(outputGradients: ReadonlyArray<Tensor | null>): InnerWalk {
    const { leaves, outputs } = this.#run()
    const used = outputGradients.flatMap((gradient, i) => (gradient !== null && outputs[i].tracked ? [i] : []))
    return { leaves, roots: used.map(i => outputs[i]), seeds: used.map(i => outputGradients[i]) }
  }

  #run() {
    if (this.#made !== null) return this.#made
    const before = context.recording
    context.recording = true
    try {
      this.#made = this.#life.run(() => {
        const leaves = this.#inputs.map(input => {
          restore(input)
          const leaf = input.detach()
          leaf.tracked = input.tracked
          return leaf
        })
        return { leaves, outputs: this.#fn(leaves) }
      })
      return this.#made
    } catch (error) {
      this.dispose()
      throw error
    } finally {
      context.recording = before
    }
  }

  /** Frees what the run created. */
  dispose(): void {
    this.#made = null
    this.#life.dispose()
  }
}

/** One tensor or several. */
type Outputs = Tensor | readonly Tensor[]

const listed = (outputs: Outputs): readonly Tensor[] => (Array.isArray(outputs) ? outputs : [outputs as Tensor])

/**
 * Runs `fn` without recording its ops, and runs it again during `backward`: gradient checkpointing, which saves the
 * memory of intermediate results at the cost of a second forward pass. Parameters used inside `fn` get their gradients.
 * During the second run `isRecomputing()` is true, and `cacheForRecompute` returns the values of the first run.
 * @param fn returns one tensor or several, and the same in the second run (except for integer tensors at the end, which
 * have no gradient)
 */
export function checkpoint<const T extends Tensor | readonly Tensor[]>(
  fn: (...inputs: Tensor[]) => T,
  ...inputs: Tensor[]
): T {
  needFunction('checkpoint', fn)
  if (!context.recording) return fn(...inputs)
  return recordAsOneOp(fn, inputs).result
}

/**
 * Runs `use` on the results of `make`, which are freed afterwards and recomputed in the backward pass when needed. For
 * results that are cheap to compute but large to keep, for example the norm before a matrix product. Unlike with
 * `checkpoint`, the results of `make` are freed too, and `use` does not run again.
 * @param make returns several tensors, and the same in the second run
 */
export function withRecomputed<const Made extends readonly Tensor[], T>(
  make: (...inputs: Tensor[]) => Made,
  use: (...made: Made) => T,
  ...inputs: Tensor[]
): T {
  if (!context.recording) return use(...make(...inputs))
  const { result, secondRun } = recordAsOneOp(make, inputs)
  return useAndDiscard(
    result,
    () => secondRun.outputs,
    () => use(...result),
  )
}

/**
 * Same signature as `withRecomputed`, but keeps the results. For code that supports both.
 * @internal
 */
export const withKept: typeof withRecomputed = (make, use, ...inputs) => use(...make(...inputs))

/** Runs `fn` and records its outputs as those of a single op. */
function recordAsOneOp<T extends Outputs>(fn: (...inputs: Tensor[]) => T, inputs: readonly Tensor[]) {
  const { precision, cachedValues: outer } = context
  const values: unknown[] = []
  context.cachedValues = values
  let result: T
  try {
    result = scope(() => {
      const made = noGrad(() => fn(...inputs))
      for (const output of listed(made)) needTensor('checkpoint', 'what the function returned', output)
      return (Array.isArray(made) ? made.map(output => output.detach()) : (made as Tensor).detach()) as T
    })
  } finally {
    context.cachedValues = outer
  }
  const secondRun = new SecondRun(inputs, leaves => {
    const before = { ...context }
    context.recomputing = true
    context.cachedValues = null
    context.replayedValues = values.values()
    try {
      return listed(withPrecision(precision, () => fn(...leaves)))
    } finally {
      context.recomputing = before.recomputing
      context.cachedValues = before.cachedValues
      context.replayedValues = before.replayedValues
    }
  })
  const outputs = listed(result)
  // The marker is tracked regardless of the inputs, because parameters used inside `fn` may need gradients.
  const marker = full([], 0, { backend: outputs[0].backend })
  marker.tracked = true
  marker.temporary = true
  record('checkpoint', [...inputs, marker], null, outputs, null, secondRun)
  return { result, secondRun }
}
