/**
 * @file Hook for the validation of calls. Outside of browsers it is `validateTokenizerCall`; browsers leave it out to
 * save code.
 */

/** Functions whose calls are validated. */
export type ValidatedOp = 'trainBpe' | 'encode' | 'encodeBatch' | 'decode' | 'fromTiktoken'

/** Throws for options that are not an object, unknown option names, and options or inputs of the wrong type. */
export const validation: { check?: (op: ValidatedOp, options: object, input?: unknown) => void } = {}
