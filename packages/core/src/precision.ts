/** @file The precision of matrix products. */
import { MoeError } from './errors.ts'
import type { Precision, WidePrecision } from './ops.ts'
import { Setting } from './setting.ts'

const setting = new Setting<Precision>('f32')

/** The precisions that `withPrecision` accepts. */
export const precisions: readonly Precision[] = ['f32', 'bf16', 'fp8']

/**
 * Checks a precision that is stored for later use.
 * @throws MoeError E_ATTR if it is unknown
 * @internal
 */
export function checkPrecision(op: string, precision: Precision): void {
  if (precisions.includes(precision)) return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: `unknown precision ${JSON.stringify(precision)}`,
    fix: "pass 'f32', 'bf16' or 'fp8'",
  })
}

/**
 * Runs a synchronous function with matrix products in the given precision; accumulation stays f32. Parameters,
 * optimizer state and everything else stay f32. A backend without bf16 arithmetic multiplies in f32.
 *
 * 'fp8' applies to linear layers, experts and their backward passes; attention, batched products and the loss of the
 * output head then run in bf16 (DeepSeek-V3 report 3.3).
 * @throws MoeError E_ATTR for an unknown precision
 */
export function withPrecision<T>(precision: Precision, fn: () => T): T {
  checkPrecision('withPrecision', precision)
  return setting.during('withPrecision', precision, fn)
}

/** Returns the current precision of matrix products. */
export const currentPrecision = (): Precision => setting.value

/** Returns the precision for products that never run in fp8: bf16 in its place. */
export const widePrecision = (precision: Precision = setting.value): WidePrecision =>
  precision === 'fp8' ? 'bf16' : precision
