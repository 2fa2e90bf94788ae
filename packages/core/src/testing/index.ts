/** @file The suite that verifies a backend in a few lines, and comparisons of numbers with clear failure messages. */
export { type CaseInput, type OpCase, opCase } from './case.ts'
export { assertClose, normalizedError, type Tolerance, tolerances } from './compare.ts'
export { compareWithReference, type OpResult } from './compare-with-reference.ts'
export { finiteDifference } from './finite-difference.ts'
export { graphSuite, type Recorder } from './graph-suite.ts'
export { type HostInput, runOp } from './run-op.ts'
export { backendSuite, caseName, opCases, type SuiteCheck, type SuiteOptions } from './suite.ts'
