/** @file Recomputing: forward passes that are run again on the way back, in place of keeping what they made. */
import { context, noGrad, withPrecision } from '../context.ts'
import { full } from '../create.ts'
import { needTensor } from '../need-tensor.ts'
import { Lifetime, scope } from '../scope.ts'
import { record, type Tensor } from '../tensor.ts'
import { lend, restore } from './discarded.ts'

/** Where a walk goes on, inside of a second run. */
interface Inside {
  /** In place of the inputs. */
  readonly leaves: readonly Tensor[]
  /** Outputs that gradients have arrived for, and these. */
  readonly roots: readonly Tensor[]
  readonly seeds: ReadonlyArray<Tensor | null>
}

/** A function that is run once more, with recording on; at most once till `dispose`. Internal. */
export class SecondRun {
  readonly #inputs: readonly Tensor[]
  readonly #fn: (inputs: readonly Tensor[]) => readonly Tensor[]
  readonly #life = new Lifetime()
  #made: { readonly leaves: readonly Tensor[]; readonly outputs: readonly Tensor[] } | null = null

  constructor(inputs: readonly Tensor[], fn: (inputs: readonly Tensor[]) => readonly Tensor[]) {
    this.#inputs = inputs
    this.#fn = fn
  }

  /** What it gives. */
  get outputs(): readonly Tensor[] {
    return this.#run().outputs
  }

  towards(flowing: ReadonlyArray<Tensor | null>): Inside {
    const { leaves, outputs } = this.#run()
    const used = flowing.flatMap((gradient, i) => (gradient !== null && outputs[i].tracked ? [i] : []))
    return { leaves, roots: used.map(i => outputs[i]), seeds: used.map(i => flowing[i]) }
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

  /** Frees what the run has made. */
  dispose(): void {
    this.#made = null
    this.#life.dispose()
  }
}

/** A tensor, or several. */
type Outputs = Tensor | readonly Tensor[]

const listed = (outputs: Outputs): readonly Tensor[] => (Array.isArray(outputs) ? outputs : [outputs as Tensor])

/**
 * Runs `fn` without recording its inside, and runs it again during `backward`: the memory of its intermediate results is
 * traded for a second forward pass. Parameters used inside `fn` get their gradients. `isRecomputing()` is true in the second run, where
 * `remember` gives what it gave in the first.
 * @param fn gives a tensor or several, in the second run as in the first (but for integers at the end, which have no gradient)
 */
export function checkpoint<T extends Tensor | readonly Tensor[]>(
  fn: (...inputs: Tensor[]) => T,
  ...inputs: Tensor[]
): T {
  if (!context.recording) return fn(...inputs)
  return recordedApart(fn, inputs).result
}

/**
 * Runs `use` on what `make` gives, which is freed behind it and made again on the way back, when it is needed: for what takes little time to make and much memory to keep, such as the norm
 * before a matrix product. Like `checkpoint`, but the results of `make` are not kept either, and `use` is not run again.
 * @param make gives several tensors, in the second run as in the first
 */
export function withRecomputed<const Made extends readonly Tensor[], T>(
  make: (...inputs: Tensor[]) => Made,
  use: (...made: Made) => T,
  ...inputs: Tensor[]
): T {
  if (!context.recording) return use(...make(...inputs))
  const { result, again } = recordedApart(make, inputs)
  return lend(
    result,
    () => again.outputs,
    () => use(...result),
  )
}

/**
 * The same without recomputing: for who can do both.
 * @internal
 */
export const withKept: typeof withRecomputed = (make, use, ...inputs) => use(...make(...inputs))

/** The outputs of `fn`, recorded as those of one op. */
function recordedApart<T extends Outputs>(fn: (...inputs: Tensor[]) => T, inputs: readonly Tensor[]) {
  const { precision, remembered: outer } = context
  const remembered: unknown[] = []
  context.remembered = remembered
  let result: T
  try {
    result = scope(() => {
      const made = noGrad(() => fn(...inputs))
      for (const output of listed(made)) needTensor('checkpoint', 'what the function returned', output)
      return (Array.isArray(made) ? made.map(output => output.detach()) : (made as Tensor).detach()) as T
    })
  } finally {
    context.remembered = outer
  }
  const again = new SecondRun(inputs, leaves => {
    const before = { ...context }
    Object.assign(context, { recomputing: true, remembered: null, recalled: remembered.values() })
    try {
      return listed(withPrecision(precision, () => fn(...leaves)))
    } finally {
      context.recomputing = before.recomputing
      context.remembered = before.remembered
      context.recalled = before.recalled
    }
  })
  const outputs = listed(result)
  // The marker is tracked whatever the inputs are, because parameters inside fn may need gradients.
  const marker = full([], 0, { backend: outputs[0].backend })
  marker.tracked = true
  marker.temporary = true
  record('checkpoint', [...inputs, marker], null, outputs, null, again)
  return { result, again }
}
