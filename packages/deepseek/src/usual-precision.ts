/** @file In what precision a model decodes when nothing is said. */
import { namedParameters, type Precision, QuantizedParameter } from '@moe/core'
import type { DeepSeek } from './model.ts'

/** Stored weights are rounded more than bf16 rounds what they are multiplied with. */
export function usualPrecision(model: DeepSeek): Precision {
  return namedParameters(model).some(({ parameter }) => parameter instanceof QuantizedParameter) ? 'bf16' : 'f32'
}
