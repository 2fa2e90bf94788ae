/** @file The default precision of inference. */
import { namedParameters, type Precision, QuantizedParameter } from '@moe/core'
import type { DeepSeek } from './model.ts'

/** bf16 for quantized weights, whose rounding error exceeds that of bf16 products. */
export function defaultPrecision(model: DeepSeek): Precision {
  return namedParameters(model).some(({ parameter }) => parameter instanceof QuantizedParameter) ? 'bf16' : 'f32'
}
