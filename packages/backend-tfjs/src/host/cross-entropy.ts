/** @file Cross-entropy on host memory, in blocks of rows, so that the exponentials of all logits are never stored at once. */
import type { FusedAttrs, TensorSpec, Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { f32Of, type Host, i32Of } from './memory.ts'

const f32View = (host: Host, tensor: TfTensor): Float32Array => host.view(tensor) as Float32Array

/** Number of elements whose exponentials are computed at a time. */
const chunkElements = 1 << 20

const counts = (target: number, classes: number, ignoreIndex: number): boolean =>
  target !== ignoreIndex && target >= 0 && target < classes

/** exp(logits - shift) of `count` rows starting at `first`; the caller disposes it. */
function shiftedExp(host: Host, logits: Value, first: number, count: number, shifts: ArrayLike<number>): TfTensor {
  const classes = logits.shape[1]
  const shifted = host.output([count, classes], 'float32')
  const [to, from] = [f32View(host, shifted), f32Of(host, logits)]
  for (let r = 0, at = 0; r < count; r++) {
    const by = shifts[first + r]
    for (let i = (first + r) * classes; i < (first + r + 1) * classes; i++) to[at++] = from[i] - by
  }
  const out = host.runner.run('Exp', { x: shifted })
  shifted.dispose()
  return out
}

function* chunks(rows: number, classes: number): Generator<[first: number, count: number]> {
  const step = Math.max(1, Math.floor(chunkElements / classes))
  for (let first = 0; first < rows; first += step) yield [first, Math.min(step, rows - first)]
}

export function crossEntropy(
  host: Host,
  [logits, targets]: readonly Value[],
  { ignoreIndex }: FusedAttrs['crossEntropy'],
  specs: readonly TensorSpec[],
) {
  const [rows, classes] = logits.shape
  if (rows * classes === 0) return undefined
  const [loss, lse] = specs.map(({ shape }) => host.output(shape, 'float32'))
  const largest = new Float64Array(rows)
  const x = f32Of(host, logits)
  for (let r = 0; r < rows; r++) {
    let max = Number.NEGATIVE_INFINITY
    for (let i = r * classes; i < (r + 1) * classes; i++) if (x[i] > max || x[i] !== x[i]) max = x[i]
    largest[r] = max === Number.NEGATIVE_INFINITY ? 0 : max
  }
  for (const [first, count] of chunks(rows, classes)) {
    const e = shiftedExp(host, logits, first, count, largest)
    const [p, sums] = [f32View(host, e), f32View(host, lse)]
    for (let r = 0; r < count; r++) {
      let sum = 0
      for (let i = r * classes; i < (r + 1) * classes; i++) sum += p[i]
      sums[first + r] = largest[first + r] + Math.log(sum)
    }
    e.dispose()
  }
  const [to, sums, from, wanted] = [f32View(host, loss), f32View(host, lse), f32Of(host, logits), i32Of(host, targets)]
  for (let r = 0; r < rows; r++) {
    to[r] = counts(wanted[r], classes, ignoreIndex) ? sums[r] - from[r * classes + wanted[r]] : 0
  }
  return [loss, lse]
}

export function crossEntropyBackward(
  host: Host,
  [logits, targets, lse, dloss]: readonly Value[],
  { ignoreIndex }: FusedAttrs['crossEntropyBackward'],
  [spec]: readonly TensorSpec[],
) {
  const [rows, classes] = logits.shape
  if (rows * classes === 0) return undefined
  const out = host.output(spec.shape, 'float32')
  const shifts = f32Of(host, lse).slice()
  for (const [first, count] of chunks(rows, classes)) {
    const e = shiftedExp(host, logits, first, count, shifts)
    const [p, to, wanted, weight] = [f32View(host, e), f32View(host, out), i32Of(host, targets), f32Of(host, dloss)]
    for (let r = 0; r < count; r++) {
      const row = first + r
      const target = wanted[row]
      const to0 = row * classes
      if (!counts(target, classes, ignoreIndex)) {
        to.fill(0, to0, to0 + classes)
        continue
      }
      const w = weight[row]
      for (let i = 0; i < classes; i++) to[to0 + i] = p[r * classes + i] * w
      to[to0 + target] = (p[r * classes + target] - 1) * w
    }
    e.dispose()
  }
  return [out]
}
