/** @file Products with quantized weights, dense and per expert. */
import type { QuantizedAttrs, TensorSpec, Value } from '@moe/core'
import { type FusedFactory, type Native, pointerOf } from '../../native.ts'

/** The values of `Format` in formats.h. */
const formats = { bf16: 0, fp8: 1, int8: 2, int4: 3 } as const

function launcher(native: Native) {
  // All but the last four values are shared by products of the same x with several weights.
  const transposed = native.kernel('moe_quantized_matmul_f32', 9)
  const untransposed = native.kernel('moe_quantized_matmul_untransposed_f32')
  return (
    x: Value,
    q: Value,
    scale: Value | undefined,
    offsets: Value | undefined,
    { format, block, columns, transposeW, precision }: QuantizedAttrs,
    spec: TensorSpec,
  ) => {
    const y = native.output(spec)
    const rows = q.shape[q.shape.length - 2]
    const input = [pointerOf(x), offsets === undefined ? 0 : pointerOf(offsets), x.shape[0]]
    const experts = offsets === undefined ? 1 : q.shape[0]
    const weight = [pointerOf(q), scale === undefined ? 0 : pointerOf(scale), rows]
    const form = [columns, formats[format], ...block, precision === 'bf16' ? 1 : 0]
    if (transposeW) transposed(...input, experts, ...form, 1, y.pointer, ...weight)
    else untransposed(y.pointer, ...input, experts, ...weight, ...form)
    return [y]
  }
}

export const quantizedMatmul: FusedFactory<'quantizedMatmul'> = native => {
  const launch = launcher(native)
  return ([x, q, scale], attrs, [spec]) => launch(x, q, scale, undefined, attrs, spec)
}

export const quantizedGroupedMatmul: FusedFactory<'quantizedGroupedMatmul'> = native => {
  const launch = launcher(native)
  return ([x, q, offsets, scale], attrs, [spec]) => launch(x, q, scale, offsets, attrs, spec)
}
