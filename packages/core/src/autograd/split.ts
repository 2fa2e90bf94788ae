/** @file A backward pass in two parts: what others wait for at once, gradients of weights when there is time. */
import { noGrad } from '../context.ts'
import { MoeError } from '../errors.ts'
import { showShape } from '../shape.ts'
import type { TapeNode, Tensor } from '../tensor.ts'
import {
  accumulate,
  add,
  checkSeed,
  drop,
  hasArrived,
  type OnLeaf,
  reachable,
  release,
  send,
  sendOn,
  sendSeeds,
} from './backward.ts'
import type { SecondRun } from './checkpoint.ts'

/** A backward pass of which the inputs' part is done. */
export interface SplitBackward {
  /** For each input its gradient, or null where nothing depends on it. They belong to no scope: dispose of them. */
  readonly gradients: ReadonlyArray<Tensor | null>
  /** The other part: adds to `.grad` of the parameters what was put off, and frees all that was kept for it. Once. */
  weights(): void
  /** Gives the other part up, and frees what was kept for it. */
  dispose(): void
}

/** Ops most of whose work is for their weights, and whose gradient rule does only what is needed. Of other ops all gradients are computed at once. */
const apart: ReadonlySet<TapeNode['op']> = new Set(['matmul', 'groupedMatmul', 'routedExperts'])

/**
 * Goes back from `outputs` to `inputs`, leaving the gradients of weights in matrix products for later: a stage of a pipeline sends the gradient of its input on
 * before it does the rest ("Zero bubble pipeline parallelism", Qi et al. 2024: B and W). Both parts together are `backward`, with the same numbers.
 *
 * Intermediate results that the second part needs stay until then; the others are freed at once, and no output can be gone back from twice.
 * @param inputs tensors that no recorded op has made, with `tracked = true` set before the forward pass
 * @param gradients of the outputs, where they are not scalars; null is 1
 * @throws MoeError E_NO_GRADIENT, E_DISPOSED and E_SHAPE as `backward`, E_CONFIG for an input that is an intermediate result or not tracked
 */
export function backwardInput(
  outputs: readonly Tensor[],
  inputs: readonly Tensor[],
  gradients: ReadonlyArray<Tensor | null> = [],
): SplitBackward {
  for (const [i, output] of outputs.entries()) checkSeed(output, gradients[i] ?? undefined)
  for (const input of inputs) checkInput(input)
  const found = new Map<Tensor, Tensor>()
  const wanted = new Set(inputs)
  const onLeaf = (leaf: Tensor, gradient: Tensor) => {
    if (wanted.has(leaf)) add(found, leaf, gradient)
    else accumulate(leaf, gradient)
  }
  const giveBack = () => {
    for (const gradient of found.values()) gradient.dispose()
  }
  const { weights, dispose } = split(outputs, wanted, gradients, { onLeaf, giveBack })
  let done = false
  return {
    gradients: inputs.map(input => found.get(input) ?? null),
    weights() {
      if (done) throw usedUp()
      done = true
      try {
        noGrad(weights)
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
  /** The second part. */
  weights(): void
  /** Frees all that is left, whether there was a second part or not. */
  dispose(): void
}

/** @param towards the leaves of which the first part is to find the gradients */
function split(
  outputs: readonly Tensor[],
  towards: ReadonlySet<Tensor>,
  seeds: ReadonlyArray<Tensor | null>,
  { onLeaf, giveBack }: { readonly onLeaf: OnLeaf; readonly giveBack?: () => void },
): Split {
  const nodes = reachable(outputs)
  const leading = pathTo(towards, nodes)
  /** Nodes that have a second part, and which of their inputs it is for. */
  const putOff = new Map<TapeNode, boolean[]>()
  /** Second parts of what is gone through in a checkpoint. */
  const inside = new Map<TapeNode, Split>()
  const giveUp = () => {
    for (const node of nodes) {
      drop(node.flowing)
      inside.get(node)?.dispose()
      node.again?.dispose()
    }
  }
  noGrad(() => {
    try {
      sendSeeds(outputs, seeds, onLeaf)
      for (const node of nodes) {
        const leads = leading.get(node)
        if (leads === undefined || !hasArrived(node.flowing)) continue
        const { inputs: own } = node
        const others = own.map((input, i) => input.tracked && !leads[i])
        if (node.again !== null) {
          sendInside(node, node.again, { inside, onLeaf })
          drop(node.flowing)
        } else if (apart.has(node.op) && others.includes(true)) {
          sendOn(node, i => leads[i], onLeaf)
          putOff.set(node, others)
        } else {
          sendOn(node, i => own[i].tracked, onLeaf)
          drop(node.flowing)
        }
      }
    } catch (error) {
      giveUp()
      giveBack?.()
      throw error
    }
  })
  const left = nodes.filter(node => putOff.has(node) || !leading.has(node))
  const kept = freeAllBut(left, nodes, outputs)
  const isLeft = new Set(left)
  return {
    weights() {
      for (const node of nodes) {
        inside.get(node)?.weights()
        if (!isLeft.has(node) || !hasArrived(node.flowing)) continue
        const needed = putOff.get(node) ?? node.inputs.map(input => input.tracked)
        sendOn(node, i => needed[i], accumulate)
        drop(node.flowing)
      }
    },
    dispose() {
      giveUp()
      for (const node of left) release(node, outputs)
      for (const tensor of kept) tensor.dispose()
    },
  }
}

/** Goes through the second run of a checkpoint as `split` goes through what is around it. */
function sendInside(
  node: TapeNode,
  again: SecondRun,
  { inside, onLeaf }: { inside: Map<TapeNode, Split>; onLeaf: OnLeaf },
): void {
  const { leaves, roots, seeds } = again.towards(node.flowing)
  if (roots.length === 0) return
  const towards = new Set(leaves.filter(leaf => leaf.tracked))
  const insideOut = (leaf: Tensor, gradient: Tensor) => {
    if (towards.has(leaf)) send(node.inputs[leaves.indexOf(leaf)], gradient, onLeaf)
    else onLeaf(leaf, gradient)
  }
  inside.set(node, split(roots, towards, seeds, { onLeaf: insideOut }))
}

/** Nodes through which gradients reach the wanted leaves, each with which of its inputs lead there. */
function pathTo(wanted: ReadonlySet<Tensor>, nodes: readonly TapeNode[]): Map<TapeNode, boolean[]> {
  const path = new Map<TapeNode, boolean[]>()
  for (let n = nodes.length - 1; n >= 0; n--) {
    const leads = nodes[n].inputs.map(input => wanted.has(input) || (input.node !== null && path.has(input.node)))
    if (leads.includes(true)) path.set(nodes[n], leads)
  }
  return path
}

/** Frees the intermediate results that no node which is left reads, and gives the others. */
function freeAllBut(left: readonly TapeNode[], nodes: readonly TapeNode[], outputs: readonly Tensor[]): Tensor[] {
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
    problem: `an input ${showShape(input.shape)} is ${input.tracked ? 'an intermediate result' : 'not tracked'}`,
    fix: 'detach() it and set tracked = true before the forward pass',
  })
}

function usedUp(): MoeError {
  return new MoeError({
    code: 'E_DISPOSED',
    op: 'backwardInput',
    problem: 'the gradients of the weights were computed already, or given up',
    fix: 'call weights() once',
  })
}
