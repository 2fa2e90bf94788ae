/** @file Reverse-mode differentiation: one walk over the recorded ops, newest first. */
import { needDtype, needList, needTensor } from '../checks.ts'
import { full } from '../create.ts'
import { MoeError } from '../errors.ts'
import type { PrimitiveName } from '../ops.ts'
import { checkOptions, type OptionNames } from '../options.ts'
import { Parameter } from '../parameter.ts'
import { adopt, currentScope, enterScope, leaveScope } from '../scope.ts'
import { sameShape, showShape } from '../shape.ts'
import { noGrad, type SecondRun, type TapeNode, type Vjp } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { RepeatedRun } from './checkpoint.ts'
import { restore } from './discarded.ts'
import { rules } from './rules.ts'

/** Options of `backward` and `gradients`. */
export interface BackwardOptions {
  /** Gradient of the loss with respect to itself, in the shape of the loss. Required if the loss is not a scalar. */
  readonly gradient?: Tensor | undefined
  /** Keeps the recorded ops and their intermediate results for another backward pass. Default false. */
  readonly retainGraph?: boolean | undefined
}

const names: OptionNames<BackwardOptions> = { gradient: true, retainGraph: true }

/**
 * Runs the backward pass: adds d loss / d p to `p.grad` of every trainable parameter p that the loss depends on.
 *
 * Frees everything that was recorded for it: all intermediate results in the history of the loss, but not the loss
 * itself. To keep such a value, call `detach()` on it before.
 * @throws MoeError E_NO_GRADIENT if the loss depends on no parameter, E_DISPOSED if a tensor between them was already
 * freed, E_SHAPE if the loss is not a scalar and no gradient is given. In these cases, no `.grad` has changed.
 */
export function backward(loss: Tensor, options: BackwardOptions = {}): void {
  checkOptions('backward', options, names)
  checkSeed(loss, options.gradient)
  checkRecorded([loss])
  walk([loss], [options.gradient ?? null], options.retainGraph === true, accumulate)
}

/**
 * Returns the gradients of a scalar loss with respect to the given tensors (recorded intermediate results or
 * parameters), without changing any `.grad`. The entry of a tensor on which the loss does not depend is null. The
 * results belong to no scope, so dispose of them yourself.
 * @throws MoeError E_NO_GRADIENT, E_DISPOSED and E_SHAPE as `backward`
 */
export function gradients<const Of extends readonly Tensor[]>(
  loss: Tensor,
  of: Of,
  options: BackwardOptions = {},
): { -readonly [K in keyof Of]: Tensor | null } {
  checkOptions('gradients', options, names)
  needList('gradients', 'of', of, 'pass an array of tensors')
  const found = new Map<Tensor, Tensor>()
  const wanted = new Set(of)
  const collect = (leaf: Tensor, gradient: Tensor) => {
    if (wanted.has(leaf)) add(found, leaf, gradient)
    else gradient.dispose()
  }
  checkSeed(loss, options.gradient)
  checkRecorded([loss])
  disposeOnFailure(found, () => walk([loss], [options.gradient ?? null], options.retainGraph === true, collect, wanted))
  return of.map(tensor => found.get(tensor) ?? null) as { -readonly [K in keyof Of]: Tensor | null }
}

/**
 * Checks that the loss is a scalar or has a gradient of its shape. Internal.
 * @throws MoeError E_SHAPE, E_DTYPE, E_ATTR
 */
export function checkSeed(loss: Tensor, given?: Tensor): void {
  needTensor('backward', 'the loss', loss)
  if (given !== undefined) {
    needTensor('backward', 'the gradient', given)
    needDtype('backward', 'the gradient', given, 'f32', loss.dtype)
    if (sameShape(given.shape, loss.shape)) return
    throw new MoeError({
      code: 'E_SHAPE',
      op: 'backward',
      problem: `the gradient has shape ${showShape(given.shape)}, the loss ${showShape(loss.shape)}`,
      fix: 'pass a gradient of the shape of the loss',
    })
  }
  if (loss.size !== 1) {
    throw new MoeError({
      code: 'E_SHAPE',
      op: 'backward',
      problem: `the loss has shape ${showShape(loss.shape)}, expected a scalar`,
      fix: 'reduce it with .mean() or .sum(), or pass { gradient }',
    })
  }
}

/**
 * Checks that at least one output was recorded, or is itself a parameter or a wanted leaf. Internal.
 * @throws MoeError E_NO_GRADIENT
 */
export function checkRecorded(outputs: readonly Tensor[], wanted: readonly Tensor[] = []): void {
  // A freed tensor has lost its history, which `reachable` reports.
  const leads = (output: Tensor) =>
    output.node !== null ||
    (output.tracked && (output.disposed || output instanceof Parameter || wanted.includes(output)))
  if (outputs.some(leads)) return
  throw new MoeError({
    code: 'E_NO_GRADIENT',
    op: 'backward',
    problem: 'the loss depends on no recorded trainable parameter',
    fix: 'run the forward pass outside noGrad(), do not detach() tensors that lead to the loss, and pass { retainGraph: true } for a second backward pass',
  })
}

/** Adds a gradient to the one that is collected for a tensor. Internal. */
export function add(map: Map<Tensor, Tensor>, to: Tensor, gradient: Tensor): void {
  const before = map.get(to)
  map.set(to, before === undefined ? gradient : sum(before, gradient))
}

/** Frees the gradients collected so far if `fn` fails. */
function disposeOnFailure(found: ReadonlyMap<Tensor, Tensor>, fn: () => void): void {
  try {
    fn()
  } catch (error) {
    for (const gradient of found.values()) gradient.dispose()
    throw error
  }
}

/** Handles leaves in `backward`: parameters accumulate their gradient, other tracked leaves drop it. Internal. */
export function accumulate(leaf: Tensor, gradient: Tensor): void {
  if (!(leaf instanceof Parameter)) {
    gradient.dispose()
    return
  }
  leaf.grad = leaf.grad === null ? gradient : sum(leaf.grad, gradient)
}

/**
 * Propagates gradients from `outputs` to the leaves, starting with `seeds` (null means ones). `onLeaf` takes ownership
 * of each leaf's gradient and may be called several times for one leaf. Tensors in `stops` count as leaves too.
 */
function walk(
  outputs: readonly Tensor[],
  seeds: ReadonlyArray<Tensor | null>,
  retain: boolean,
  onLeaf: OnLeaf,
  stops?: ReadonlySet<Tensor>,
): void {
  const nodes = reachable(outputs)
  noGrad(() => {
    let n = 0
    try {
      sendSeeds(outputs, seeds, onLeaf)
      for (; n < nodes.length; n++) {
        const node = nodes[n]
        const { inputs, outputGradients } = node
        if (hasGradient(outputGradients)) {
          propagate(node, i => inputs[i].tracked, onLeaf)
          for (let i = 0; i < outputGradients.length; i++) {
            const gradient = outputGradients[i]
            if (gradient === null) continue
            outputGradients[i] = null
            if (stops?.has(node.outputs[i])) onLeaf(node.outputs[i], gradient)
            else gradient.dispose()
          }
        }
        if (!retain) release(node, outputs)
      }
    } finally {
      // If a rule failed, gradients and second runs are left over, which the next walk must not find.
      for (; n < nodes.length; n++) {
        disposeGradients(nodes[n].outputGradients)
        nodes[n].secondRun?.dispose()
      }
    }
  })
}

/** Receives the gradient of a tensor that no recorded op made, and takes ownership of it. */
export type OnLeaf = (leaf: Tensor, gradient: Tensor) => void

/** Sends the initial gradient of every output. Internal. */
export function sendSeeds(outputs: readonly Tensor[], seeds: ReadonlyArray<Tensor | null>, onLeaf: OnLeaf): void {
  outputs.forEach((output, i) => {
    send(output, seeds[i]?.detach() ?? full(output.shape, 1, output), onLeaf)
  })
}

/** Adds a gradient to those that have arrived for a tensor, and takes ownership of it. Internal. */
export function send(to: Tensor, gradient: Tensor, onLeaf: OnLeaf): void {
  gradient.owner = null
  const { node } = to
  if (node === null) {
    onLeaf(to, gradient)
    return
  }
  const before = node.outputGradients[to.outputIndex]
  node.outputGradients[to.outputIndex] = before === null ? gradient : sum(before, gradient)
}

/** Returns whether a gradient has arrived for any output. Internal. */
export function hasGradient(outputGradients: TapeNode<Tensor>['outputGradients']): boolean {
  for (let i = 0; i < outputGradients.length; i++) if (outputGradients[i] !== null) return true
  return false
}

/**
 * Propagates the gradients that have arrived at a node to the inputs that need them. The node keeps its gradients.
 * Internal.
 */
export function propagate(node: TapeNode<Tensor>, needs: (input: number) => boolean, onLeaf: OnLeaf): void {
  const { inputs, outputs, attrs, outputGradients } = node
  for (let i = 0; i < inputs.length; i++) restore(inputs[i])
  if (node.secondRun !== null) {
    propagateThroughSecondRun(node, node.secondRun, onLeaf)
    return
  }
  const outer = currentScope()
  const own = enterScope()
  try {
    const toInputs = rule(node)({ inputs, outputs, attrs: attrs as never, needs }, outputGradients)
    for (let i = 0; i < toInputs.length; i++) {
      const gradient = toInputs[i]
      if (gradient !== null && needs(i)) send(inputs[i], gradient.owner === own ? gradient : gradient.detach(), onLeaf)
    }
  } finally {
    leaveScope(own, outer)
  }
}

/** Frees the gradients of a node. Internal. */
export function disposeGradients(outputGradients: TapeNode<Tensor>['outputGradients']): void {
  for (let i = 0; i < outputGradients.length; i++) {
    outputGradients[i]?.dispose()
    outputGradients[i] = null
  }
}

/** Returns the sum of two gradients and disposes of both. If the addition fails, `a` still belongs to the caller. */
function sum(a: Tensor, b: Tensor): Tensor {
  let total: Tensor
  try {
    total = a.add(b)
  } catch (error) {
    b.dispose()
    throw error
  }
  total.owner = null
  a.dispose()
  b.dispose()
  return total
}

let walks = 0

/**
 * Returns the nodes that lead to the outputs, newest first, so that every consumer comes before what it consumes.
 * Internal.
 * @throws MoeError E_DISPOSED
 */
export function reachable(outputs: readonly Tensor[]): TapeNode<Tensor>[] {
  const walk = ++walks
  const found: TapeNode<Tensor>[] = []
  const visit = (tensor: Tensor) => {
    const { node } = tensor
    if (tensor.handle === null && tensor.tracked && !tensor.temporary) throw freed(tensor)
    if (node !== null && node.walk !== walk) {
      node.walk = walk
      found.push(node)
    }
  }
  outputs.forEach(visit)
  for (let i = 0; i < found.length; i++) {
    const { inputs } = found[i]
    for (let j = 0; j < inputs.length; j++) visit(inputs[j])
  }
  return found.sort((a, b) => b.id - a.id)
}

/** Continuing would lose the gradient that has to pass through the freed tensor. */
function freed(tensor: Tensor): MoeError {
  return new MoeError({
    code: 'E_DISPOSED',
    op: 'backward',
    problem: `a tensor of shape ${showShape(tensor.shape)} that leads to the loss was already freed`,
    fix: 'call backward inside the scope() of the forward pass, do not dispose of tensors before it, and pass { retainGraph: true } to the first of two calls',
  })
}

function rule(node: TapeNode<Tensor>): Vjp<Tensor, never> {
  const { gradient } = node
  if (gradient === null) return rules[node.op as PrimitiveName] as Vjp<Tensor, never>
  return (
    gradient.vjp ??
    ((ctx, outputGradients) =>
      throughDecomposition(ctx.inputs, outputGradients, inputs => gradient.decompose(inputs, ctx.attrs)))
  )
}

/**
 * Differentiates the second run of a checkpoint as if it had been recorded in the first place: gradients are added in
 * the same order.
 */
function propagateThroughSecondRun(node: TapeNode<Tensor>, secondRun: SecondRun<Tensor>, onLeaf: OnLeaf): void {
  try {
    const { leaves, roots, seeds } = secondRun.startingFrom(node.outputGradients)
    const onInnerLeaf = (leaf: Tensor, gradient: Tensor) => {
      const at = leaves.indexOf(leaf)
      if (at < 0) onLeaf(leaf, gradient)
      else send(node.inputs[at], gradient, onLeaf)
    }
    if (roots.length > 0) walk(roots, seeds, false, onInnerLeaf)
  } finally {
    secondRun.dispose()
  }
}

/** Differentiates a fused op that has no gradient rule. */
function throughDecomposition(
  inputs: readonly Tensor[],
  outputGradients: ReadonlyArray<Tensor | null>,
  decompose: (inputs: readonly Tensor[]) => readonly Tensor[],
): Array<Tensor | null> {
  const secondRun = new RepeatedRun(inputs, decompose)
  try {
    const { leaves, roots, seeds } = secondRun.startingFrom(outputGradients)
    const found = new Map<Tensor, Tensor>()
    disposeOnFailure(found, () => {
      if (roots.length > 0) walk(roots, seeds, false, (leaf, gradient) => add(found, leaf, gradient))
    })
    return leaves.map(leaf => {
      const gradient = found.get(leaf)
      return gradient === undefined ? null : adopt(gradient)
    })
  } finally {
    secondRun.dispose()
  }
}

/** Frees what was recorded at a node, except the roots. Internal. */
export function release(node: TapeNode<Tensor>, roots: readonly Tensor[]): void {
  for (const output of node.outputs) {
    if (roots.includes(output)) output.node = null
    else output.dispose()
  }
  for (const input of node.inputs) {
    if (input.temporary) input.dispose()
  }
  node.inputs = []
  node.outputs = []
  node.secondRun?.dispose()
}
