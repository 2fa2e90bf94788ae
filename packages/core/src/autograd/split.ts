/**
 * @file A backward pass in two parts: first the gradients that other ranks wait for, later the gradients of weights.
 */
import { needList } from '../checks.ts'
import { MoeError } from '../errors.ts'
import { showShape } from '../shape.ts'
import { noGrad, type SecondRun, type TapeNode } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import {
  accumulate,
  add,
  checkRecorded,
  checkSeed,
  disposeGradients,
  hasGradient,
  type OnLeaf,
  propagate,
  reachable,
  release,
  send,
  sendSeeds,
} from './backward.ts'

/** A backward pass whose first part, the gradients of the inputs, is done. */
export interface SplitBackward {
  /**
   * The gradient of each input, or null if no output depends on it. They belong to no scope, so dispose of them
   * yourself.
   */
  readonly gradients: ReadonlyArray<Tensor | null>
  /**
   * Runs the second part: adds the deferred gradients to `.grad` of the parameters and frees everything kept for it.
   * Call it once.
   */
  backwardWeight(): void
  /** Cancels the second part and frees everything kept for it. */
  dispose(): void
}

/**
 * Ops that spend much of their work on weight gradients, and whose rules compute only what is needed. All gradients of
 * other ops are computed in the first part.
 */
const deferrable: ReadonlySet<TapeNode<Tensor>['op']> = new Set(['matmul', 'groupedMatmul', 'routedExperts'])

/**
 * Propagates gradients from `outputs` to `inputs`, and defers the weight gradients of matrix products. A pipeline stage
 * can then send the gradient of its input before it does the rest ("Zero bubble pipeline parallelism", Qi et al. 2024:
 * B and W). Both parts together compute the same numbers as `backward`.
 *
 * Intermediate results that the second part needs are kept until then; all others are freed at once. No output supports
 * a second backward pass.
 * @param inputs tensors that no recorded op has made, with `tracked = true` set before the forward pass
 * @param gradients of the outputs, required for those that are not scalars; null means 1
 * @throws MoeError E_NO_GRADIENT, E_DISPOSED and E_SHAPE as `backward`, E_CONFIG for an input that is an intermediate
 * result or not tracked
 */
export function backwardInput(
  outputs: readonly Tensor[],
  inputs: readonly Tensor[],
  gradients: ReadonlyArray<Tensor | null> = [],
): SplitBackward {
  for (const [name, list] of Object.entries({ outputs, inputs, gradients }))
    needList('backwardInput', name, list, 'pass an array of tensors')
  for (const [i, output] of outputs.entries()) checkSeed(output, gradients[i] ?? undefined)
  checkRecorded(outputs, inputs)
  for (const input of inputs) checkInput(input)
  const found = new Map<Tensor, Tensor>()
  const wanted = new Set(inputs)
  const onLeaf = (leaf: Tensor, gradient: Tensor) => {
    if (wanted.has(leaf)) add(found, leaf, gradient)
    else accumulate(leaf, gradient)
  }
  const disposeFound = () => {
    for (const gradient of found.values()) gradient.dispose()
  }
  const { backwardWeight, dispose } = split(outputs, wanted, gradients, { onLeaf, onFailure: disposeFound })
  let done = false
  return {
    gradients: inputs.map(input => found.get(input) ?? null),
    backwardWeight() {
      if (done) throw finished()
      done = true
      try {
        noGrad(backwardWeight)
      } finally {
        dispose()
      }
    },
    dispose() {
      done = true
      dispose()
    },
  }
}

interface Split {
  /** Runs the second part. */
  backwardWeight(): void
  /** Frees everything that is left, whether or not the second part ran. */
  dispose(): void
}

/** @param targets the leaves whose gradients the first part computes */
function split(
  outputs: readonly Tensor[],
  targets: ReadonlySet<Tensor>,
  seeds: ReadonlyArray<Tensor | null>,
  { onLeaf, onFailure }: { readonly onLeaf: OnLeaf; readonly onFailure?: () => void },
): Split {
  const nodes = reachable(outputs)
  const leading = pathTo(targets, nodes)
  /** Nodes with a second part, and which of their inputs it computes the gradients of. */
  const deferred = new Map<TapeNode<Tensor>, boolean[]>()
  /** Second parts inside checkpoints. */
  const inside = new Map<TapeNode<Tensor>, Split>()
  const dropRest = () => {
    for (const node of nodes) {
      disposeGradients(node.outputGradients)
      inside.get(node)?.dispose()
      node.secondRun?.dispose()
    }
  }
  noGrad(() => {
    try {
      sendSeeds(outputs, seeds, onLeaf)
      for (const node of nodes) {
        const leads = leading.get(node)
        if (leads === undefined || !hasGradient(node.outputGradients)) continue
        const { inputs: own } = node
        const others = own.map((input, i) => input.tracked && !leads[i])
        if (node.secondRun !== null) {
          sendInside(node, node.secondRun, { inside, onLeaf })
          disposeGradients(node.outputGradients)
        } else if (deferrable.has(node.op) && others.includes(true)) {
          propagate(node, i => leads[i], onLeaf)
          deferred.set(node, others)
        } else {
          propagate(node, i => own[i].tracked, onLeaf)
          disposeGradients(node.outputGradients)
        }
      }
    } catch (error) {
      dropRest()
      onFailure?.()
      throw error
    }
  })
  const left = nodes.filter(node => deferred.has(node) || !leading.has(node))
  const kept = freeAllBut(left, nodes, outputs)
  const isLeft = new Set(left)
  return {
    backwardWeight() {
      for (const node of nodes) {
        inside.get(node)?.backwardWeight()
        if (!isLeft.has(node) || !hasGradient(node.outputGradients)) continue
        const needed = deferred.get(node) ?? node.inputs.map(input => input.tracked)
        propagate(node, i => needed[i], accumulate)
        disposeGradients(node.outputGradients)
      }
    },
    dispose() {
      dropRest()
      for (const node of left) release(node, outputs)
      for (const tensor of kept) tensor.dispose()
    },
  }
}

/** Splits the second run of a checkpoint in the same way as the graph around it. */
function sendInside(
  node: TapeNode<Tensor>,
  secondRun: SecondRun<Tensor>,
  { inside, onLeaf }: { inside: Map<TapeNode<Tensor>, Split>; onLeaf: OnLeaf },
): void {
  const { leaves, roots, seeds } = secondRun.startingFrom(node.outputGradients)
  if (roots.length === 0) return
  const targets = new Set(leaves.filter(leaf => leaf.tracked))
  const onInnerLeaf = (leaf: Tensor, gradient: Tensor) => {
    if (targets.has(leaf)) send(node.inputs[leaves.indexOf(leaf)], gradient, onLeaf)
    else onLeaf(leaf, gradient)
  }
  inside.set(node, split(roots, targets, seeds, { onLeaf: onInnerLeaf }))
}

/** Returns the nodes through which gradients reach the wanted leaves, and for each which of its inputs lead there. */
function pathTo(wanted: ReadonlySet<Tensor>, nodes: readonly TapeNode<Tensor>[]): Map<TapeNode<Tensor>, boolean[]> {
  const path = new Map<TapeNode<Tensor>, boolean[]>()
  for (let n = nodes.length - 1; n >= 0; n--) {
    const leads = nodes[n].inputs.map(input => wanted.has(input) || (input.node !== null && path.has(input.node)))
    if (leads.includes(true)) path.set(nodes[n], leads)
  }
  return path
}

/** Frees the intermediate results that no remaining node reads, and returns the others. */
function freeAllBut(
  left: readonly TapeNode<Tensor>[],
  nodes: readonly TapeNode<Tensor>[],
  outputs: readonly Tensor[],
): Tensor[] {
  const read = new Set(left.flatMap(node => node.inputs))
  const stays = new Set(left)
  const kept: Tensor[] = []
  for (const node of nodes) {
    if (stays.has(node)) continue
    for (const tensor of [...node.outputs, ...node.inputs.filter(input => input.temporary)]) {
      if (outputs.includes(tensor)) tensor.node = null
      else if (read.has(tensor)) kept.push(tensor)
      else tensor.dispose()
    }
    node.inputs = []
    node.outputs = []
  }
  return kept
}

function checkInput(input: Tensor): void {
  if (input.node === null && input.tracked) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'backwardInput',
    problem: `an input of shape ${showShape(input.shape)} is ${input.tracked ? 'an intermediate result' : 'not tracked'}`,
    fix: 'detach() it and set tracked = true before the forward pass',
  })
}

function finished(): MoeError {
  return new MoeError({
    code: 'E_DISPOSED',
    op: 'backwardInput',
    problem: 'the gradients of the weights were already computed or cancelled',
    fix: 'call backwardWeight() once',
  })
}
