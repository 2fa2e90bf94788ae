/**
 * @file Hook for the validation of calls. Outside of browsers it is validate-call.ts; browsers leave it out to save
 * code.
 */
import type { OptionsByOp } from './validate-call.ts'

/** Throws for options that are not an object, unknown option names, and options or inputs of the wrong type. */
export const validation: {
  check?: <Op extends keyof OptionsByOp>(op: Op, options: OptionsByOp[Op], input?: unknown) => void
} = {}
