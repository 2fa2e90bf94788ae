/** @file What defines a fused op, and how one runs: by the backend's kernel, or else as its decomposition. */
import type { TensorSpec } from '../backend.ts'
import { checkInputs } from '../check-inputs.ts'
import type { FusedAttrs, FusedName } from '../ops.ts'
import type { GradientSource, Vjp } from '../tape.ts'
import { composed, type Tensor, wrap } from '../tensor.ts'

/** A fused op: its contract, its meaning in terms of primitives, and its gradient. */
export interface FusedDefinition<F extends FusedName> {
  readonly name: F
  /** Checks the inputs and returns the shapes and dtypes of the outputs. */
  infer(inputs: readonly Tensor[], attrs: FusedAttrs[F]): TensorSpec[]
  /** Computes the same result with other ops. */
  decompose(inputs: readonly Tensor[], attrs: FusedAttrs[F]): Tensor[]
  /** Gradient rule. If null, `backward` runs the decomposition again and differentiates it. */
  readonly vjp: Vjp<Tensor, FusedAttrs[F]> | null
}

/** How often a fused op ran as its decomposition, by `backend:op`. */
const counts = new Map<string, number>()

/** Runs a fused op with the backend's kernel, or as its decomposition if the backend has none. */
export function runFused<F extends FusedName>(
  definition: FusedDefinition<F>,
  inputs: readonly Tensor[],
  attrs: FusedAttrs[F],
): Tensor[] {
  const { name } = definition
  const backend = checkInputs(name, inputs)
  const specs = definition.infer(inputs, attrs)
  const kernel = backend.fused[name]
  const handles = kernel?.(inputs, attrs, specs)
  if (handles !== undefined)
    return wrap(name, backend, inputs, attrs, specs, handles, definition as GradientSource<Tensor>)
  const key = `${backend.name}:${name}`
  counts.set(key, (counts.get(key) ?? 0) + 1)
  return composed(inputs, () => definition.decompose(inputs, attrs))
}

/** A fused op that ran without a kernel. */
export interface Fallback {
  /** `Backend.name`. */
  readonly backend: string
  /** The op that was decomposed. */
  readonly op: FusedName
  /** Number of calls since the process started. */
  readonly count: number
}

/**
 * Returns the fused ops that ran as their decomposition so far, most frequent first. Fallbacks are slower, but compute
 * the same result.
 */
export function fallbacks(): Fallback[] {
  return [...counts]
    .map(([key, count]) => {
      const split = key.lastIndexOf(':')
      return { backend: key.slice(0, split), op: key.slice(split + 1) as FusedName, count }
    })
    .sort((a, b) => b.count - a.count)
}
