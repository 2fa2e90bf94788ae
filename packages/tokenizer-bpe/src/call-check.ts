/** @file Where calls are checked first: by check-call.ts outside of browsers, which do without, as what loads there is counted. */
import type { OptionsByOp } from './check-call.ts'

/** Refuses options that are no object, names that nobody reads, and an input of another kind. */
export const callCheck: {
  of?: <Op extends keyof OptionsByOp>(op: Op, options: OptionsByOp[Op], input?: unknown) => void
} = {}
