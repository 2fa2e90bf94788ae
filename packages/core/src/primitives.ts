/** @file Primitives that belong to no single tensor, as functions. */
import { attrError, needTensor } from './checks.ts'
import { describe } from './errors.ts'
import { checkOptions } from './options.ts'
import { normalizeAxis } from './shape.ts'
import { isRecording } from './tape.ts'
import { run, type Tensor } from './tensor.ts'

/** `condition ? a : b`, elementwise with NumPy broadcasting; the condition is u8. @throws MoeError E_SHAPE, E_DTYPE */
export function where(condition: Tensor, a: Tensor, b: Tensor): Tensor {
  return run('where', [condition, a, b], {})
}

/** Concatenates tensors along an axis. @throws MoeError E_SHAPE, E_DTYPE */
export function concat(parts: readonly Tensor[], axis = 0): Tensor {
  if (!Array.isArray(parts))
    throw attrError('concat', `the parts are ${describe(parts)}, not an array`, 'pass an array of tensors: [a, b]')
  if (parts.length === 0) return run('concat', parts, { axis: 0 })
  needTensor('concat', 'input 0', parts[0])
  const at = normalizeAxis('concat', axis, parts[0].rank)
  return parts.length === 1 ? parts[0] : run('concat', parts.slice(), { axis: at })
}

/**
 * Returns zeros `[rows, ...rest]` with every row of `source` added to the row given by `index`, in order and in the
 * dtype of `source`: millions of f32 rows with the same index lose precision, unlike `sum`. Rows out of range are
 * dropped.
 */
export function scatterAddRows(index: Tensor, source: Tensor, rows: number): Tensor {
  return run('scatterAddRows', [index, source], { rows })
}

const setRowsNames = { donate: true }

/**
 * Returns `x` with the rows at `index` replaced by those of `source`. `donate` gives up x, so that the result can reuse
 * its memory.
 */
export function setRows(x: Tensor, index: Tensor, source: Tensor, options: { donate?: boolean } = {}): Tensor {
  checkOptions('setRows', options, setRowsNames)
  // What is still read, by this op or by a gradient, cannot be overwritten.
  const isRead = index === x || source === x || (isRecording() && (x.tracked || source.tracked))
  const donate = options.donate === true && !isRead
  const out = run('setRows', [x, index, source], { donate })
  if (donate) x.dispose()
  return out
}
