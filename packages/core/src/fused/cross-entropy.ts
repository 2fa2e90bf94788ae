/** @file Cross-entropy with class indices, from logits or from hidden states and the output matrix. */
import { needDtype, needShape } from '../checks.ts'
import { arange, full } from '../create.ts'
import type { FusedAttrs } from '../ops.ts'
import { checkOptions } from '../options.ts'
import { widePrecision } from '../precision.ts'
import { where } from '../primitives.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'
import { rowMax } from './softmax.ts'

/** 1 where the target counts: an existing class that is not `ignoreIndex`. `u8 [N]`. */
function counted(targets: Tensor, classes: number, ignoreIndex: number): Tensor {
  const low = targets.lt(0).cast('i32')
  const high = targets.lt(classes).cast('i32').neg().add(1)
  const ignored = targets.eq(ignoreIndex).cast('i32')
  return low.add(high).add(ignored).eq(0)
}

function perRow(x: Tensor): Tensor {
  return x.reshape([x.shape[0], 1])
}

export const crossEntropyDefinition: FusedDefinition<'crossEntropy'> = {
  name: 'crossEntropy',
  infer([logits, targets]) {
    needDtype('crossEntropy', 'logits', logits, 'f32')
    needDtype('crossEntropy', 'targets', targets, 'i32')
    needShape('crossEntropy', 'logits', logits, [-1, -1], 'reshape them to [N, V]')
    needShape('crossEntropy', 'targets', targets, [logits.shape[0]])
    return [
      { shape: targets.shape, dtype: 'f32' },
      { shape: targets.shape, dtype: 'f32' },
    ]
  },
  decompose([logits, targets], { ignoreIndex }) {
    const [rows, classes] = logits.shape
    const max = rowMax(logits)
    const lse = max.add(logits.sub(max).exp().sum(-1, true).log()).reshape([rows])
    const counts = counted(targets, classes, ignoreIndex)
    const start = arange(rows, targets).mul(classes)
    const picked = logits.reshape([rows * classes]).takeRows(where(counts, start.add(targets), full([], -1, targets)))
    return [where(counts, lse.sub(picked), full([], 0, lse)), lse]
  },
  vjp({ inputs: [logits, targets], outputs: [, lse], attrs }, [dloss, dLse]) {
    if (dLse !== null) throw new Error('the log-sum-exp of crossEntropy carries no gradient')
    if (dloss === null) return [null, null]
    return [runFused(crossEntropyBackwardDefinition, [logits, targets, lse, dloss], attrs)[0], null]
  },
}

export const crossEntropyBackwardDefinition: FusedDefinition<'crossEntropyBackward'> = {
  name: 'crossEntropyBackward',
  infer: ([logits]) => [logits],
  decompose([logits, targets, lse, dloss], { ignoreIndex }) {
    const classes = logits.shape[1]
    const weight = where(counted(targets, classes, ignoreIndex), dloss, full([], 0, dloss))
    const p = logits.sub(perRow(lse)).exp()
    const hit = perRow(targets)
      .eq(arange(classes, targets).reshape([1, classes]))
      .cast('f32')
    return [p.sub(hit).mul(perRow(weight))]
  },
  vjp: null,
}

export const linearCrossEntropyDefinition: FusedDefinition<'linearCrossEntropy'> = {
  name: 'linearCrossEntropy',
  infer([x, weight, targets]) {
    for (const [name, value] of Object.entries({ input: x, weight }))
      needDtype('linearCrossEntropy', name, value, 'f32')
    needDtype('linearCrossEntropy', 'targets', targets, 'i32')
    needShape('linearCrossEntropy', 'x', x, [-1, -1], 'reshape it to [N, D]')
    needShape('linearCrossEntropy', 'weight', weight, [-1, x.shape[1]])
    needShape('linearCrossEntropy', 'targets', targets, [x.shape[0]])
    return [
      { shape: targets.shape, dtype: 'f32' },
      { shape: targets.shape, dtype: 'f32' },
    ]
  },
  decompose([x, weight, targets], { ignoreIndex, precision }) {
    const logits = x.matmul(weight, { transposeB: true, precision })
    return runFused(crossEntropyDefinition, [logits, targets], { ignoreIndex })
  },
  vjp({ inputs: [x, weight, targets], outputs: [, lse], attrs }, [dloss, dLse]) {
    if (dLse !== null) throw new Error('the log-sum-exp of linearCrossEntropy carries no gradient')
    if (dloss === null) return [null, null, null]
    return [...runFused(linearCrossEntropyBackwardDefinition, [x, weight, targets, lse, dloss], attrs), null]
  },
}

export const linearCrossEntropyBackwardDefinition: FusedDefinition<'linearCrossEntropyBackward'> = {
  name: 'linearCrossEntropyBackward',
  infer: ([x, weight]) => [x, weight],
  decompose([x, weight, targets, lse, dloss], { ignoreIndex, precision }: FusedAttrs['linearCrossEntropyBackward']) {
    const logits = x.matmul(weight, { transposeB: true, precision })
    const [dlogits] = runFused(crossEntropyBackwardDefinition, [logits, targets, lse, dloss], { ignoreIndex })
    return [dlogits.matmul(weight, { precision }), dlogits.matmul(x, { transposeA: true, precision })]
  },
  vjp: null,
}

/** Target value that marks a position without loss, as in PyTorch. */
export const defaultIgnoreIndex = -100

const names = { ignoreIndex: true }

/**
 * Returns -log softmax(logits)[target] for every row: `logits [N, V]` and `targets i32 [N]` to `[N]`. The loss is 0
 * where the target is `ignoreIndex` (default -100) or not a class.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function crossEntropy(logits: Tensor, targets: Tensor, options: { ignoreIndex?: number } = {}): Tensor {
  checkOptions('crossEntropy', options, names)
  return runFused(crossEntropyDefinition, [logits, targets], {
    ignoreIndex: options.ignoreIndex ?? defaultIgnoreIndex,
  })[0]
}

/**
 * Returns the cross-entropy of the logits `x weight^T` without storing all logits: `x [N, D]`, `weight [V, D]` and
 * `targets i32 [N]` to `[N]`. The loss is 0 where the target is `ignoreIndex` (default -100) or not a class.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function linearCrossEntropy(
  x: Tensor,
  weight: Tensor,
  targets: Tensor,
  options: { ignoreIndex?: number } = {},
): Tensor {
  checkOptions('linearCrossEntropy', options, names)
  const attrs = { ignoreIndex: options.ignoreIndex ?? defaultIgnoreIndex, precision: widePrecision() }
  return runFused(linearCrossEntropyDefinition, [x, weight, targets], attrs)[0]
}
