/** @file One matrix product per expert, over row ranges that only the device knows. */
import { needDtype, needShape } from '../checks.ts'
import { arange } from '../create.ts'
import { checkOptions } from '../options.ts'
import { currentPrecision } from '../precision.ts'
import { concat } from '../primitives.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

/** 1 for the rows of the expert, 0 for others: `f32 [N, 1]`. */
function rowsOf(expert: number, rows: Tensor, offsets: Tensor): Tensor {
  const start = offsets.narrow(0, expert, expert + 1)
  const end = offsets.narrow(0, expert + 1, expert + 2)
  return start.le(rows).cast('f32').mul(rows.lt(end).cast('f32')).reshape([rows.shape[0], 1])
}

export const groupedMatmulDefinition: FusedDefinition<'groupedMatmul'> = {
  name: 'groupedMatmul',
  infer([x, weight, offsets], { transposeW }) {
    for (const [name, value] of Object.entries({ input: x, weight })) needDtype('groupedMatmul', name, value, 'f32')
    needDtype('groupedMatmul', 'offsets', offsets, 'i32')
    needShape('groupedMatmul', 'x', x, [-1, -1], 'reshape it to [N, K]')
    const inner = x.shape[1]
    needShape('groupedMatmul', 'weight', weight, transposeW ? [-1, -1, inner] : [-1, inner, -1])
    needShape('groupedMatmul', 'offsets', offsets, [weight.shape[0] + 1], 'pass the offsets of dispatchPlan')
    return [{ shape: [x.shape[0], weight.shape[transposeW ? 1 : 2]], dtype: 'f32' }]
  },
  // Multiplies all rows by every expert's weight and masks the rest: E times the work, but nothing is read back.
  decompose([x, weight, offsets], { transposeW, precision }) {
    const [experts, a, b] = weight.shape
    const rows = arange(x.shape[0], offsets)
    const parts = Array.from({ length: experts }, (_, e) =>
      x
        .mul(rowsOf(e, rows, offsets))
        .matmul(weight.narrow(0, e, e + 1).reshape([a, b]), { transposeB: transposeW, precision }),
    )
    return [parts.reduce((sum, part) => sum.add(part))]
  },
  vjp({ inputs: [x, weight, offsets], attrs: { transposeW, precision }, needs }, [dy]) {
    if (dy === null) return [null, null, null]
    const dx = () => runFused(groupedMatmulDefinition, [dy, weight, offsets], { transposeW: !transposeW, precision })[0]
    const dw = () =>
      runFused(groupedMatmulWeightGradDefinition, transposeW ? [x, dy, offsets] : [dy, x, offsets], { precision })[0]
    return [needs(0) ? dx() : null, needs(1) ? dw() : null, null]
  },
}

export const groupedMatmulWeightGradDefinition: FusedDefinition<'groupedMatmulWeightGrad'> = {
  name: 'groupedMatmulWeightGrad',
  infer: ([x, dy, offsets]) => [{ shape: [offsets.shape[0] - 1, dy.shape[1], x.shape[1]], dtype: 'f32' }],
  // Moves each expert's rows to the top of a matrix of all rows, because tiles of 'fp8' start at the expert's first
  // row.
  decompose([x, dy, offsets], { precision }) {
    const rows = arange(x.shape[0], offsets)
    const parts = Array.from({ length: offsets.shape[0] - 1 }, (_, e) => {
      const start = offsets.narrow(0, e, e + 1)
      const isOwn = rows
        .add(start)
        .lt(offsets.narrow(0, e + 1, e + 2))
        .cast('f32')
        .reshape([x.shape[0], 1])
      const own = (of: Tensor) => of.takeRows(rows.add(start).minimum(x.shape[0] - 1)).mul(isOwn)
      return own(dy).matmul(own(x), { transposeA: true, precision }).reshape([1, dy.shape[1], x.shape[1]])
    })
    return [concat(parts)]
  },
  vjp: null,
}

const names = { transposeW: true }

/**
 * Multiplies rows `offsets[e]` to `offsets[e+1] - 1` of `x [N, k]` by the transposed weight of expert e: `weight [E, n,
 * k]` to `[N, n]`. With `transposeW: false`, the weight `[E, k, n]` is not transposed. Rows past the last offset give
 * zeros.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function groupedMatmul(
  x: Tensor,
  weight: Tensor,
  offsets: Tensor,
  options: { transposeW?: boolean } = {},
): Tensor {
  checkOptions('groupedMatmul', options, names)
  const attrs = { transposeW: options.transposeW ?? true, precision: currentPrecision() }
  return runFused(groupedMatmulDefinition, [x, weight, offsets], attrs)[0]
}
