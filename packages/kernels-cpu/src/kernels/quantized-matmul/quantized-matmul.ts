/** @file Products with weights stored in fewer bits, one weight or one per expert. */
import type { QuantizedAttrs, TensorSpec, Value } from '@moe/core'
import { type FusedFactory, type Native, pointerOf } from '../../native.ts'

/** As `Format` in formats.h. */
const formats = { bf16: 0, fp8: 1, int8: 2, int4: 3 } as const

function launcher(native: Native) {
  // All but the last four values are common to products of the same x with several weights.
  const product = native.kernel('moe_quantized_matmul_f32', 9)
  return (
    x: Value,
    q: Value,
    scale: Value | undefined,
    offsets: Value | undefined,
    attrs: QuantizedAttrs,
    spec: TensorSpec,
  ) => {
    const y = native.output(spec)
    const experts = offsets === undefined ? 1 : q.shape[0]
    product(
      pointerOf(x),
      offsets === undefined ? 0 : pointerOf(offsets),
      x.shape[0],
      experts,
      x.shape[1],
      formats[attrs.format],
      attrs.block[0],
      attrs.block[1],
      attrs.precision === 'bf16' ? 1 : 0,
      1,
      y.pointer,
      pointerOf(q),
      scale === undefined ? 0 : pointerOf(scale),
      spec.shape[1],
    )
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
