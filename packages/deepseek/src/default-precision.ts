/** @file The default precision of inference. */
import { type Module, namedParameters, type Precision, QuantizedParameter } from '@moe/core'

/** bf16 for quantized weights, whose rounding error exceeds that of bf16 products. */
export function defaultPrecision(model: Module): Precision {
  return namedParameters(model).some(({ parameter }) => parameter instanceof QuantizedParameter) ? 'bf16' : 'f32'
}
