/** @file Tolerances of the fused ops, by the precision of their products. */
import type { WidePrecision } from '../../ops.ts'
import { tolerances } from '../compare.ts'

/** Sums in f32. */
export const sum = { tolerance: tolerances.sum, gradientTolerance: tolerances.gradient }
/** bf16 products: relative error 2^-8 per product of numbers of size about 1. */
export const rough = (absolute = 0.05) => ({
  tolerance: { relative: 2e-2, absolute },
  gradientTolerance: { relative: 3e-2, absolute: absolute * 2 },
})
/** Precisions of products that never run in fp8. */
export const precisions: readonly WidePrecision[] = ['f32', 'bf16']
