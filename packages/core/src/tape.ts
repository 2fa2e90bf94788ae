/**
 * @file The tape: what `backward` needs to know of each op that ran.
 *
 * Every output points to the op that made it, and the op to its inputs. `T` is the type of these tensors: their class,
 * with the ops as methods, is defined on top of this file.
 */
import type { Handle } from './backend.ts'
import { type DType, isFloat } from './dtype.ts'
import type { OpName } from './ops.ts'
import { Setting } from './setting.ts'

/** The part of a tensor that recording reads and writes. */
export interface Recordable<T> {
  handle: Handle
  readonly dtype: DType
  /** The op that made it, while recorded. */
  node: TapeNode<T> | null
  /** Index among the outputs of that op. */
  outputIndex: number
  /** Whether gradients flow to this tensor: a trainable parameter, or computed from one while recording. */
  tracked: boolean
  /** A number wrapped for one op and freed with it, or a recorded tensor that was freed on purpose. */
  temporary: boolean
  dispose(): void
}

/** A recorded op: what `backward` needs to propagate gradients from its outputs to its inputs. */
export interface TapeNode<T> {
  /** Creation order: the nodes that made a node's inputs have smaller ids. */
  readonly id: number
  readonly op: OpName | 'checkpoint' | 'customGradient'
  inputs: readonly T[]
  readonly attrs: unknown
  outputs: readonly T[]
  /** During `backward`: the gradient of each output accumulated so far. */
  readonly outputGradients: Array<T | null>
  /** The last backward walk that visited this node. */
  walk: number
  /** How to differentiate the op; null for primitives, whose rules are looked up by name. */
  readonly gradient: GradientSource<T> | null
  /** For a checkpoint: the second run to differentiate. */
  readonly secondRun: SecondRun<T> | null
}

/** How to differentiate an op: by its rule or, if that is null, by differentiating its decomposition. */
export interface GradientSource<T> {
  readonly vjp: Vjp<T, never> | null
  decompose(inputs: readonly T[], attrs: never): T[]
}

/**
 * Maps gradients of the outputs (null if there is none) to gradients of the inputs (null if there is none or it is not
 * wanted).
 */
export type Vjp<T, Attrs> = (
  context: VjpContext<T, Attrs>,
  gradients: ReadonlyArray<T | null>,
) => ReadonlyArray<T | null>

/** The arguments of a gradient rule. `needs(i)` returns whether the gradient of input i is wanted. */
export interface VjpContext<T, Attrs> {
  readonly inputs: readonly T[]
  readonly outputs: readonly T[]
  readonly attrs: Attrs
  needs(input: number): boolean
}

/** Ops that ran without being recorded, and run again to be differentiated. */
export interface SecondRun<T> {
  /** Runs the ops, and returns where a backward walk continues inside. */
  startingFrom(outputGradients: ReadonlyArray<T | null>): InnerWalk<T>
  /** Frees what the run created. */
  dispose(): void
}

/** Where a backward walk continues inside a second run. */
export interface InnerWalk<T> {
  /** Stand-ins for the inputs. */
  readonly leaves: readonly T[]
  /** Outputs for which a gradient has arrived; `seeds` are these gradients. */
  readonly roots: readonly T[]
  readonly seeds: ReadonlyArray<T | null>
}

/** Whether ops are being recorded. Internal. */
export const recording = new Setting(true)

/** Runs a synchronous function without recording its ops for `backward`. */
export function noGrad<T>(fn: () => T): T {
  return recording.during('noGrad', false, fn)
}

/** Returns whether ops are being recorded for `backward`. */
export const isRecording = (): boolean => recording.value

let nextNode = 0

/** While `withUses` runs: the tracked inputs of ops that were not recorded. */
let uses: Set<unknown> | null = null
/** While `substituting` runs: what to record in place of a tensor. */
let substitutes: ReadonlyMap<unknown, unknown> | null = null

/** While `withReshapes` runs: its tensors, and their reshapes so far. */
let watched: Set<unknown> | null = null

/** Records an op for `backward` if one of its inputs is tracked. Internal. */
export function record<T extends Recordable<T>>(
  op: TapeNode<T>['op'],
  inputs: readonly T[],
  attrs: unknown,
  outputs: readonly T[],
  gradient: GradientSource<T> | null,
  secondRun: SecondRun<T> | null = null,
): void {
  if (substitutes !== null) inputs = inputs.map(input => (substitutes?.get(input) ?? input) as T)
  for (let i = 0; i < inputs.length; i++) {
    if (!inputs[i].tracked) continue
    const outputGradients = new Array<T | null>(outputs.length).fill(null)
    const node: TapeNode<T> = {
      id: nextNode++,
      op,
      inputs,
      attrs,
      outputs,
      outputGradients,
      walk: 0,
      gradient,
      secondRun,
    }
    for (let j = 0; j < outputs.length; j++) {
      const output = outputs[j]
      output.node = node
      output.outputIndex = j
      output.tracked = isFloat(output.dtype)
    }
    if (op === 'reshape' && watched?.has(inputs[0])) watched.add(outputs[0])
    return
  }
}

/** Notes the inputs of an op that is not recorded, for `withUses`. Internal. */
export function noteUse<T extends Recordable<T>>(inputs: readonly T[]): void {
  if (uses === null) return
  for (const input of inputs) if (input.tracked) uses.add(input)
}

/** Runs `fn` without recording. Returns its result, and the tracked tensors that its ops read. Internal. */
export function withUses<T extends Recordable<T>, R>(fn: () => R): { result: R; uses: ReadonlySet<T> } {
  const outer = uses
  const own = new Set<T>()
  uses = own
  try {
    return { result: noGrad(fn), uses: own }
  } finally {
    uses = outer
    for (const use of own) outer?.add(use)
  }
}

/** Runs `fn`, and records its ops as if they had read the substitutes of their inputs. Internal. */
export function substituting<T extends Recordable<T>, R>(pairs: ReadonlyMap<T, T>, fn: () => R): R {
  const outer = substitutes
  substitutes = pairs
  try {
    return fn()
  } finally {
    substitutes = outer
  }
}

/** Runs `fn`. Returns its result, and `tensors` with all reshapes of them that `fn` recorded. Internal. */
export function withReshapes<T extends Recordable<T>, R>(
  tensors: readonly T[],
  fn: () => R,
): { result: R; tensors: ReadonlySet<T> } {
  const outer = watched
  const seen = (outer ?? new Set<T>()) as Set<T>
  for (const tensor of tensors) seen.add(tensor)
  watched = seen
  const own = new Set(tensors)
  try {
    return { result: fn(), tensors: own }
  } finally {
    // In order of creation: a reshape comes after the tensor that it shares its elements with.
    for (const tensor of seen) {
      const { node } = tensor
      if (node?.op === 'reshape' && own.has(node.inputs[0])) own.add(tensor)
    }
    for (const tensor of own) seen.delete(tensor)
    watched = outer
  }
}

/**
 * Frees an intermediate result at once, recorded or not. Only for results that nothing reads after the op that was just
 * run: no gradient rule, and not the caller. Internal.
 */
export function disposeRecorded<T extends Recordable<T>>(tensor: T): void {
  const { node } = tensor
  tensor.dispose()
  tensor.node = node
  tensor.temporary = true
}

/**
 * Like `disposeRecorded`, and also frees the tensors that this one is a reshape of. For results that one module gets
 * from another and reads only once.
 * @internal
 */
export function disposeAfterUse<T extends Recordable<T>>(tensor: T): void {
  let last: T | undefined = tensor
  while (last !== undefined) {
    const node: TapeNode<T> | null = last.node
    disposeRecorded(last)
    last = node?.op === 'reshape' ? node.inputs[0] : undefined
  }
}
