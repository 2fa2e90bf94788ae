/**
 * @file Recomputation: forward passes that run again during the backward pass, instead of keeping their activations.
 */
import { needTensor } from '../checks.ts'
import { full } from '../create.ts'
import { needFunction } from '../errors.ts'
import { Parameter } from '../parameter.ts'
import { currentPrecision, withPrecision } from '../precision.ts'
import { Lifetime, scope } from '../scope.ts'
import {
  type InnerWalk,
  isRecording,
  noteUse,
  record,
  recording,
  type SecondRun,
  substituting,
  withUses,
} from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { restore, useAndDiscard } from './discarded.ts'

let recomputing = false
/** Values that `cacheForRecompute` returned in the running `checkpoint`, for its second run. */
let cachedValues: unknown[] | null = null
/** In that second run: the values of the first run that are still to be returned. */
let replayedValues: Iterator<unknown> | null = null

/** Returns whether a forward pass is being repeated by `checkpoint`. Counters must not count it again. */
export const isRecomputing = (): boolean => recomputing

/**
 * Returns `make()`, and the same value again when `checkpoint` repeats the forward pass. For values that depend on
 * state other than tensors, for example numbers from a random stream that advances.
 */
export function cacheForRecompute<T>(make: () => T): T {
  const replayed = replayedValues?.next()
  const value = replayed === undefined || replayed.done ? make() : (replayed.value as T)
  cachedValues?.push(value)
  return value
}

/** Runs a function a second time, with recording on, at most once until `dispose`. Internal. */
export class RepeatedRun implements SecondRun<Tensor> {
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

  startingFrom(outputGradients: ReadonlyArray<Tensor | null>): InnerWalk<Tensor> {
    const { leaves, outputs } = this.#run()
    const used = outputGradients.flatMap((gradient, i) => (gradient !== null && outputs[i].tracked ? [i] : []))
    return { leaves, roots: used.map(i => outputs[i]), seeds: used.map(i => outputGradients[i]) }
  }

  #run() {
    if (this.#made !== null) return this.#made
    const run = () => {
      const leaves = this.#inputs.map(input => {
        restore(input)
        const leaf = input.detach()
        leaf.tracked = input.tracked
        return leaf
      })
      return { leaves, outputs: this.#fn(leaves) }
    }
    try {
      this.#made = this.#life.run(() => recording.during('checkpoint', true, run))
      return this.#made
    } catch (error) {
      this.dispose()
      throw error
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
 * memory of intermediate results at the cost of a second forward pass. Parameters and intermediate results that `fn`
 * reads without taking them as inputs get their gradients too.
 * During the second run `isRecomputing()` is true, and `cacheForRecompute` returns the values of the first run.
 * @param fn returns one tensor or several, and the same in the second run (except for integer tensors at the end, which
 * have no gradient)
 */
export function checkpoint<const T extends Tensor | readonly Tensor[]>(
  fn: (...inputs: Tensor[]) => T,
  ...inputs: Tensor[]
): T {
  needFunction('checkpoint', fn)
  if (!isRecording()) return unrecorded(inputs, () => fn(...inputs))
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
  if (!isRecording()) return unrecorded(inputs, () => use(...make(...inputs)))
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

/** Runs `fn` as part of the first run of an outer checkpoint, whose second run will record these inputs. */
function unrecorded<T>(inputs: readonly Tensor[], fn: () => T): T {
  noteUse(inputs)
  return fn()
}

/** Runs `fn` and records its outputs as those of a single op. */
function recordAsOneOp<T extends Outputs>(fn: (...inputs: Tensor[]) => T, inputs: readonly Tensor[]) {
  const precision = currentPrecision()
  const outer = cachedValues
  const values: unknown[] = []
  cachedValues = values
  let result: T
  let uses: readonly Tensor[]
  try {
    ;({ result, uses } = scope(() => {
      const first = withUses<Tensor, T>(() => fn(...inputs))
      const made = first.result
      for (const output of listed(made)) needTensor('checkpoint', 'what the function returned', output)
      const detached = Array.isArray(made) ? made.map(output => output.detach()) : (made as Tensor).detach()
      return { result: detached as T, uses: [...first.uses, ...listed(made).filter(output => output.tracked)] }
    }))
  } finally {
    cachedValues = outer
  }
  // Intermediate results that `fn` reads from outside of it. Parameters collect their gradients themselves.
  const captured = new Set(uses.filter(use => !(use instanceof Parameter || use.disposed || inputs.includes(use))))
  const all = [...inputs, ...captured]
  const secondRun = new RepeatedRun(all, leaves => {
    const leafOf = new Map(all.flatMap((use, i) => (use instanceof Parameter ? [] : [[use, leaves[i]]])))
    const before = { recomputing, cachedValues, replayedValues }
    recomputing = true
    cachedValues = null
    replayedValues = values.values()
    try {
      const own = leaves.slice(0, inputs.length)
      const made = substituting(leafOf, () => withPrecision(precision, () => fn(...own)))
      return listed(made).map(output => leafOf.get(output) ?? output)
    } finally {
      ;({ recomputing, cachedValues, replayedValues } = before)
    }
  })
  // A copy, because the array is the caller's.
  const outputs = listed(result).slice()
  if (outputs.length === 0) return { result, secondRun }
  // The marker is tracked regardless of the inputs, because parameters used inside `fn` may need gradients.
  const marker = full([], 0, { backend: outputs[0].backend })
  marker.tracked = true
  marker.temporary = true
  record('checkpoint', [...all, marker], null, outputs, null, secondRun)
  return { result, secondRun }
}
