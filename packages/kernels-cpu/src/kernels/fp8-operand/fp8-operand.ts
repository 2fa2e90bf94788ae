/** @file Operands of products: unchanged, or in precision 'fp8' copies rounded to fp8, whose values bf16 and f32 represent exactly. */
import { type Precision, sizeOf, type Value } from '@moe/core'
import { type Native, pointerOf } from '../../native.ts'

/** An operand with rows. k runs along a row or across rows: across `runs` equal runs of rows (default 1), or across those given by `offsets` (`i32 [runs + 1]`). */
export interface Operand {
  readonly value: Value
  readonly along: boolean
  readonly runs?: number
  readonly offsets?: Value
}

export type Multiply = (pointers: readonly number[], bf16: 0 | 1) => void

/** Calls `multiply` with the operands for this precision. */
export function withOperands(
  native: Native,
): (precision: Precision, operands: readonly Operand[], multiply: Multiply) => void {
  const along = native.kernel('moe_fp8_operand_along')
  const across = native.kernel('moe_fp8_operand_across')
  const round = (operand: Operand) => {
    const { value, runs = 1, offsets } = operand
    const rounded = native.output(value)
    const pointers = [rounded.pointer, pointerOf(value)]
    const [rows, columns] = [sizeOf(value.shape.slice(0, -1)), value.shape[value.shape.length - 1]]
    if (operand.along) along(...pointers, rows, columns)
    else across(...pointers, offsets === undefined ? 0 : pointerOf(offsets), rows, columns, runs)
    return rounded
  }
  return (precision, operands, multiply) => {
    if (precision !== 'fp8') {
      multiply(
        operands.map(({ value }) => pointerOf(value)),
        precision === 'bf16' ? 1 : 0,
      )
      return
    }
    const rounded = operands.map(round)
    multiply(
      rounded.map(({ pointer }) => pointer),
      1,
    )
    for (const buffer of rounded) native.release(buffer)
  }
}
