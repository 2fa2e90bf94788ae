/** @file Reverse-mode differentiation: one walk over the recorded ops, newest first. */
import type { PrimitiveName } from '../backend.ts'
import { noGrad } from '../context.ts'
import { full } from '../create.ts'
import { MoeError } from '../errors.ts'
import { needTensor } from '../need-tensor.ts'
import { Parameter } from '../nn/parameter.ts'
import { checkOptions, type OptionNames } from '../options.ts'
import { adopt, currentScope, enterScope, leaveScope } from '../scope.ts'
import { sameShape, showShape } from '../shape.ts'
import type { TapeNode, Tensor, Vjp } from '../tensor.ts'
import { SecondRun } from './checkpoint.ts'
import { restore } from './discarded.ts'
import { rules } from './rules.ts'

/** How a walk back begins, and what it leaves. */
export interface BackwardOptions {
  /** Gradient of the loss with respect to itself; needed when it is not a scalar. Same shape as the loss. */
  readonly gradient?: Tensor
  /** Keep the recorded ops and their intermediate results for another walk. */
  readonly retain?: boolean
}

const names: OptionNames<BackwardOptions> = { gradient: true, retain: true }

/**
 * Adds d loss / d p to `p.grad` of every trainable parameter p that the loss depends on.
 *
 * Frees what was recorded on the way (every intermediate result that is part of the history of the loss, but not the loss); keep a value that you still need
 * with `detach()` before the call.
 * @throws MoeError E_NO_GRADIENT when the loss depends on no parameter, E_DISPOSED when something between them was freed already, E_SHAPE when the loss is not a
 * scalar and no gradient is given. No `.grad` has changed then.
 */
export function backward(loss: Tensor, options: BackwardOptions = {}): void {
  checkOptions('backward', options, names)
  checkSeed(loss, options.gradient)
  walk([loss], [options.gradient ?? null], options.retain === true, accumulate)
}

/**
 * Gradients of a scalar loss with respect to the given tensors (recorded intermediates or parameters), without touching any
 * `.grad`. A tensor on which the loss does not depend gets null. The results belong to no scope: dispose of them.
 */
export function gradients(loss: Tensor, of: readonly Tensor[], options: BackwardOptions = {}): Array<Tensor | null> {
  checkOptions('gradients', options, names)
  const found = new Map<Tensor, Tensor>()
  const wanted = new Set(of)
  const collect = (leaf: Tensor, gradient: Tensor) => {
    if (wanted.has(leaf)) add(found, leaf, gradient)
    else gradient.dispose()
  }
  checkSeed(loss, options.gradient)
  walk([loss], [options.gradient ?? null], options.retain === true, collect, wanted)
  return of.map(tensor => found.get(tensor) ?? null)
}

/** Internal. @throws MoeError E_SHAPE */
export function checkSeed(loss: Tensor, given?: Tensor): void {
  needTensor('backward', 'the loss', loss)
  if (given !== undefined) {
    if (sameShape(given.shape, loss.shape)) return
    throw new MoeError({
      code: 'E_SHAPE',
      op: 'backward',
      problem: `the gradient has shape ${showShape(given.shape)}, the loss ${showShape(loss.shape)}`,
      fix: 'give both the same shape',
    })
  }
  if (loss.size !== 1) {
    throw new MoeError({
      code: 'E_SHAPE',
      op: 'backward',
      problem: `the loss has shape ${showShape(loss.shape)}`,
      fix: 'reduce it with .mean() or .sum(), or pass { gradient }',
    })
  }
}

/** Internal. */
export function add(map: Map<Tensor, Tensor>, to: Tensor, gradient: Tensor): void {
  const before = map.get(to)
  map.set(to, before === undefined ? gradient : sum(before, gradient))
}

/** Internal. Leaves of `backward`: parameters gather their gradient, other tracked leaves drop it. */
export function accumulate(leaf: Tensor, gradient: Tensor): void {
  if (!(leaf instanceof Parameter)) {
    gradient.dispose()
    return
  }
  leaf.grad = leaf.grad === null ? gradient : sum(leaf.grad, gradient)
}

/**
 * Sends gradients from `outputs` down to the leaves, starting with `seeds` (null for ones). `onLeaf` takes over each leaf's gradient
 * (kept, it may come several times per leaf); tensors in `stops` count as leaves as well.
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
        const { inputs, flowing } = node
        if (hasArrived(flowing)) {
          sendOn(node, i => inputs[i].tracked, onLeaf)
          for (let i = 0; i < flowing.length; i++) {
            const gradient = flowing[i]
            if (gradient === null) continue
            flowing[i] = null
            if (stops?.has(node.outputs[i])) onLeaf(node.outputs[i], gradient)
            else gradient.dispose()
          }
        }
        if (!retain) release(node, outputs)
      }
    } finally {
      // A rule that failed leaves gradients on their way, and second runs; the next walk must not find them.
      for (; n < nodes.length; n++) {
        drop(nodes[n].flowing)
        nodes[n].again?.dispose()
      }
    }
  })
}

/** What becomes of the gradient of a tensor that no recorded op has made. It is taken over. */
export type OnLeaf = (leaf: Tensor, gradient: Tensor) => void

/** Internal. */
export function sendSeeds(outputs: readonly Tensor[], seeds: ReadonlyArray<Tensor | null>, onLeaf: OnLeaf): void {
  outputs.forEach((output, i) => {
    send(output, seeds[i]?.detach() ?? full(output.shape, 1, output), onLeaf)
  })
}

/** Internal. Takes the gradient over. */
export function send(to: Tensor, gradient: Tensor, onLeaf: OnLeaf): void {
  gradient.owner = null
  const { node } = to
  if (node === null) {
    onLeaf(to, gradient)
    return
  }
  const before = node.flowing[to.outputIndex]
  node.flowing[to.outputIndex] = before === null ? gradient : sum(before, gradient)
}

/** Internal. */
export function hasArrived(flowing: TapeNode['flowing']): boolean {
  for (let i = 0; i < flowing.length; i++) if (flowing[i] !== null) return true
  return false
}

/** Internal. Sends what has arrived at a node to those of its inputs that are needed; it stays at the node as well. */
export function sendOn(node: TapeNode, needs: (input: number) => boolean, onLeaf: OnLeaf): void {
  const { inputs, outputs, attrs, flowing } = node
  for (let i = 0; i < inputs.length; i++) restore(inputs[i])
  if (node.again !== null) {
    sendThrough(node, node.again, onLeaf)
    return
  }
  const outer = currentScope()
  const own = enterScope()
  try {
    const toInputs = rule(node)({ inputs, outputs, attrs: attrs as never, needs }, flowing)
    for (let i = 0; i < toInputs.length; i++) {
      const gradient = toInputs[i]
      if (gradient !== null && needs(i)) send(inputs[i], gradient.owner === own ? gradient : gradient.detach(), onLeaf)
    }
  } finally {
    leaveScope(own, outer)
  }
}

/** Internal. */
export function drop(flowing: TapeNode['flowing']): void {
  for (let i = 0; i < flowing.length; i++) {
    flowing[i]?.dispose()
    flowing[i] = null
  }
}

/** Sum of two gradients, which are used up; where it fails, `a` is still the caller's. */
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
 * Internal. Nodes behind the outputs, newest first: an order in which every consumer comes before what it consumes.
 * @throws MoeError E_NO_GRADIENT, E_DISPOSED
 */
export function reachable(outputs: readonly Tensor[]): TapeNode[] {
  const walk = ++walks
  const found: TapeNode[] = []
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
  if (found.length === 0 && !outputs.some(output => output instanceof Parameter && output.tracked)) {
    throw new MoeError({
      code: 'E_NO_GRADIENT',
      op: 'backward',
      problem: 'the loss depends on no trainable parameter that was recorded',
      fix: 'run the forward pass outside noGrad(), do not detach() what leads to the loss, and pass { retain: true } to go back twice',
    })
  }
  return found.sort((a, b) => b.id - a.id)
}

/** Going on would drop the gradient that has to pass through it. */
function freed(tensor: Tensor): MoeError {
  return new MoeError({
    code: 'E_DISPOSED',
    op: 'backward',
    problem: `a tensor ${showShape(tensor.shape)} that leads to the loss was already freed`,
    fix: 'call backward inside the scope() of the forward pass, dispose nothing before it, and pass { retain: true } to the first of two calls',
  })
}

function rule(node: TapeNode): Vjp<never> {
  const { gradient } = node
  if (gradient === null) return rules[node.op as PrimitiveName] as Vjp<never>
  return (
    gradient.vjp ??
    ((ctx, flowing) => throughDecomposition(ctx.inputs, flowing, inputs => gradient.decompose(inputs, ctx.attrs)))
  )
}

/** Goes back through the second run of a checkpoint, as if it had been recorded in the first place: gradients add up in the same order. */
function sendThrough(node: TapeNode, again: SecondRun, onLeaf: OnLeaf): void {
  try {
    const { leaves, roots, seeds } = again.towards(node.flowing)
    const insideOut = (leaf: Tensor, gradient: Tensor) => {
      const at = leaves.indexOf(leaf)
      if (at < 0) onLeaf(leaf, gradient)
      else send(node.inputs[at], gradient, onLeaf)
    }
    if (roots.length > 0) walk(roots, seeds, false, insideOut)
  } finally {
    again.dispose()
  }
}

/** Goes back through a fused op that has no rule of its own. */
function throughDecomposition(
  inputs: readonly Tensor[],
  flowing: ReadonlyArray<Tensor | null>,
  decompose: (inputs: readonly Tensor[]) => readonly Tensor[],
): Array<Tensor | null> {
  const again = new SecondRun(inputs, decompose)
  try {
    const { leaves, roots, seeds } = again.towards(flowing)
    const found = new Map<Tensor, Tensor>()
    if (roots.length > 0) walk(roots, seeds, false, (leaf, gradient) => add(found, leaf, gradient))
    return leaves.map(leaf => {
      const gradient = found.get(leaf)
      return gradient === undefined ? null : adopt(gradient)
    })
  } finally {
    again.dispose()
  }
}

/** Internal. Frees what was recorded at a node, but for the roots. */
export function release(node: TapeNode, roots: readonly Tensor[]): void {
  for (const output of node.outputs) {
    if (roots.includes(output)) output.node = null
    else output.dispose()
  }
  for (const input of node.inputs) {
    if (input.temporary) input.dispose()
  }
  node.inputs = []
  node.outputs = []
  node.again?.dispose()
}
