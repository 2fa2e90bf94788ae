/** @file Compares random programs on a backend with the reference backend, and reduces those that fail. */
import type { Backend } from '../../backend.ts'
import type { DType } from '../../dtype.ts'
import { referenceBackend } from '../../reference/index.ts'
import { assertClose, tolerances } from '../compare.ts'
import { type Program, ProgramRun, randomProgram, type Step, type StepResult, type Way } from './program.ts'
import { withRoundingErrors } from './rounding-errors.ts'
import { coarse } from './steps.ts'

/** Values by the name of the output or gradient; null for a gradient of zeros. */
type Values = ReadonlyMap<string, ArrayLike<number> | null>

/** Reads all results and frees them. */
export async function readResult({ outputs, gradients }: StepResult): Promise<Values> {
  const values = new Map<string, ArrayLike<number> | null>()
  for (const [i, output] of outputs.entries()) values.set(`output ${i} [${output.shape}]`, await output.values())
  for (const [i, gradient] of gradients.entries()) {
    const read = (await gradient?.values()) ?? null
    values.set(`gradient ${i}`, read && Array.prototype.some.call(read, x => x !== 0) ? read : null)
  }
  for (const result of [...outputs, ...gradients]) result?.dispose()
  return values
}

async function evaluate(program: Program, backend: Backend, options: { way?: Way; dtypes?: ReadonlySet<DType> } = {}) {
  const { handles } = backend.stats()
  const run = new ProgramRun(program, backend, options.dtypes)
  let values: Values
  try {
    values = await readResult(run.step(options.way))
  } finally {
    run.dispose()
  }
  const left = backend.stats().handles - handles
  if (left !== 0) throw new Error(`${left} handles leaked`)
  return values
}

/** Compares values, up to the tolerance and `extra`, if given. Otherwise, bits must be the same. */
export function compareValues(actual: Values, expected: Values, extra?: (name: string) => Float64Array): void {
  for (const [name, want] of expected) {
    const got = actual.get(name) ?? null
    if (want === null && got === null) continue
    const size = (want ?? got)?.length ?? 0
    const numbers = (of: ArrayLike<number> | null) => of ?? new Float32Array(size)
    const tolerance = extra ? tolerances.sum : tolerances.exact
    assertClose(name, numbers(got), numbers(want), tolerance, extra?.(name))
  }
}

/** Returns how much a result may differ at most because of rounding, estimated from runs with random rounding errors. */
function allowance(expected: Values, runs: readonly Values[]) {
  return (name: string): Float64Array => {
    const lists = [expected, ...runs].map(values => values.get(name) ?? null)
    const size = lists.find(list => list !== null)?.length ?? 0
    const [want, ...others] = lists.map(list => list ?? new Float32Array(size))
    const spread = Float64Array.from(want, (value, i) =>
      Math.max(...others.map(other => Math.abs(other[i] - value) || 0)),
    )
    const typical = Math.sqrt(spread.reduce((sum, x) => sum + x * x, 0) / Math.max(1, size))
    return spread.map(x => 8 * x + 4 * typical)
  }
}

/** Returns the size of the rounding errors that a program may make in an op. */
function errorSize({ precision, steps }: Program): number {
  const rounds = (all: readonly Step[]): boolean => all.some(({ kind, body }) => coarse.has(kind) || rounds(body ?? []))
  if (precision === 'fp8') return 2 ** -2
  return precision === 'bf16' || rounds(steps) ? 2 ** -5 : 2 ** -22
}

/**
 * Runs a program in all ways, on a backend and on the reference backend.
 * @throws Error if results differ by more than rounding, if they have other bits the second time, or if handles leaked
 */
export async function checkProgram(program: Program, backend: Backend): Promise<void> {
  const { dtypes } = backend
  const expected = await evaluate(program, referenceBackend(), { dtypes })
  const runs: Values[] = []
  for (let seed = 1; seed <= 3; seed++) {
    runs.push(await evaluate(program, withRoundingErrors(errorSize(program), seed), { dtypes }))
  }
  const allowed = allowance(expected, runs)
  const actual = await evaluate(program, backend)
  compareValues(actual, expected, allowed)
  // These add up gradients in another order.
  for (const way of ['direct', 'split'] as const) {
    await named(way, async () => compareValues(await evaluate(program, backend, { way }), expected, allowed))
  }
  for (const way of ['backward', 'gradients', 'retained'] as const) {
    await named(`again by ${way}`, async () => compareValues(await evaluate(program, backend, { way }), actual))
  }
}

async function named(name: string, check: () => Promise<void>): Promise<void> {
  try {
    await check()
  } catch (cause) {
    throw new Error(`${name}: ${(cause as Error).message}`, { cause })
  }
}

/** Number of programs to check: that of the environment variable MOE_RANDOM_PROGRAMS, by default 10. */
export function programCount(): number {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } }
  return Number(process?.env?.MOE_RANDOM_PROGRAMS || 10)
}

/** Checks programs 0 to count - 1. @throws Error with the smallest program found that fails */
export async function checkPrograms(count: number, check: (program: Program) => Promise<void>): Promise<void> {
  for (let seed = 0; seed < count; seed++) {
    const program = randomProgram(seed)
    const failure = await failureOf(program, check)
    if (failure === null) continue
    const smallest = await reduce({ program, failure }, check)
    const text = `program ${seed}, reduced to ${JSON.stringify(smallest.program)}: ${smallest.failure.message}`
    throw new Error(text, { cause: smallest.failure })
  }
}

interface Failing {
  readonly program: Program
  readonly failure: Error
}

async function failureOf(program: Program, check: (program: Program) => Promise<void>): Promise<Error | null> {
  try {
    await check(program)
    return null
  } catch (error) {
    return error as Error
  }
}

/** Removes steps for as long as the program fails in some way. */
async function reduce(from: Failing, check: (program: Program) => Promise<void>): Promise<Failing> {
  for (const steps of withoutOneStep(from.program.steps)) {
    const program = { ...from.program, steps }
    const failure = await failureOf(program, check)
    if (failure !== null) return reduce({ program, failure }, check)
  }
  return from
}

/** Yields the lists that lack one of the steps, also inside of other steps. */
function* withoutOneStep(all: readonly Step[]): Generator<Step[]> {
  for (let i = all.length - 1; i >= 0; i--) yield all.toSpliced(i, 1)
  for (const [i, step] of all.entries()) {
    for (const body of withoutOneStep(step.body ?? [])) yield all.with(i, { ...step, body })
  }
}
