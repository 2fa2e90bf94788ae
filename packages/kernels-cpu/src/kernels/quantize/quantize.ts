/** @file Block-wise 8-bit quantization. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const quantize: FusedFactory<'quantize'> = native => {
  const kernel = native.kernel('moe_quantize_f32')
  return ([x], { block }, [qSpec, scaleSpec]) => {
    const q = native.output(qSpec)
    const scale = native.output(scaleSpec)
    kernel(q.pointer, scale.pointer, pointerOf(x), x.shape[0], x.shape[1], block[0], block[1])
    return [q, scale]
  }
}
