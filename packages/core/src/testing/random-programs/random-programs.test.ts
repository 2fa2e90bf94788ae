import { describe, expect, test } from 'vitest'
import type { Backend, Kernel, Value } from '../../backend.ts'
import type { PrimitiveName } from '../../ops.ts'
import { Random } from '../../random.ts'
import { type Numbers, readF64, referenceBackend } from '../../reference/index.ts'
import { scope } from '../../scope.ts'
import { checkProgram, checkPrograms, programCount } from './check-program.ts'
import { type Program, ProgramRun, randomProgram, type Step } from './program.ts'
import { coarse, type StepKind, steps } from './steps.ts'

test('all kinds of steps occur in the first 200 programs', () => {
  const kinds = (all: readonly Step[]): StepKind[] => all.flatMap(({ kind, body }) => [kind, ...kinds(body ?? [])])
  const found = Array.from({ length: 200 }, (_, seed) => kinds(randomProgram(seed).steps)).flat()
  expect(new Set(found)).toEqual(new Set(Object.keys(steps)))
})

/** Kinds of steps that cut off gradients, or whose results jump. */
const withoutGradient = new Set<StepKind>([...coarse, 'donate', 'detach', 'unrecorded'])

/** Removes such steps. */
const smooth = (all: readonly Step[]): Step[] =>
  all.flatMap(step => {
    if (withoutGradient.has(step.kind)) return []
    const body = smooth(step.body ?? [])
    return step.body !== undefined && body.length === 0 ? [] : [{ ...step, body }]
  })

test('gradients of random programs on the reference backend equal finite differences along a random direction', async () => {
  let compared = 0
  const count = 5 * programCount()
  await checkPrograms(count, async given => {
    const backend = referenceBackend()
    const run = new ProgramRun({ precision: 'f32', steps: smooth(given.steps) }, backend)
    const { outputs, gradients } = run.step()
    const { parameters } = run
    const directions = parameters.map(({ size }, i) => new Random(1).fork(i).normal(size))
    const slope = gradients.reduce(
      (sum, gradient, i) => sum + (gradient ? dot(readF64(gradient), directions[i]) : 0),
      0,
    )
    const lossAt = (distance: number) => {
      const data = parameters.map(parameter => readF64(parameter) as Float64Array)
      const before = data.map(numbers => numbers.slice())
      for (const [i, numbers] of data.entries())
        for (const [j, x] of numbers.entries()) numbers[j] = x + distance * directions[i][j]
      const value = scope(() => {
        const { loss } = run.loss()
        return loss === null ? 0 : readF64(loss)[0]
      })
      for (const [i, numbers] of data.entries()) numbers.set(before[i])
      return value
    }
    const differences = [1e-5, 3e-6, 1e-6].map(step => (lossAt(step) - lossAt(-step)) / (2 * step))
    for (const t of [...outputs, ...gradients]) t?.dispose()
    run.dispose()
    expect(backend.stats().handles).toBe(0)
    const tolerance = 2e-5 * (1 + Math.abs(differences[2]))
    // Otherwise there is a jump or a bend between the two points.
    if (!differences.every(difference => Math.abs(difference - differences[2]) < tolerance / 2)) return
    expect(Math.abs(differences[1] - slope)).toBeLessThan(tolerance)
    compared++
  })
  expect(compared).toBeGreaterThan(0.9 * count)
})

const dot = (a: Numbers, b: ArrayLike<number>) => Array.from(a).reduce((sum, x, i) => sum + x * b[i], 0)

describe('mistakes of a backend are found, and the program is reduced:', () => {
  /** A reference backend that edits the results of a primitive. */
  const editing = (name: PrimitiveName, edit: (numbers: Float64Array, inputs: readonly Value[]) => void): Backend => {
    const base = referenceBackend()
    const kernel = base.primitives[name] as Kernel<never>
    const edited: Kernel<never> = (inputs, attrs, outputs) => {
      const handles = kernel(inputs, attrs, outputs)
      const result = { ...outputs[0], handle: handles[0] }
      if (result.dtype === 'f32') edit(readF64(result) as Float64Array, inputs)
      return handles
    }
    return { ...base, primitives: { ...base.primitives, [name]: edited } }
  }
  const scale = (numbers: Float64Array, factor: number) => numbers.set(numbers.map(x => x * factor))
  let calls = 0
  test.each<[string, Backend]>([
    ['a product that is off by a thousandth', editing('matmul', x => scale(x, 1.001))],
    ['a wrong last element of a sum', editing('reduce', x => (x[x.length - 1] += 0.01))],
    ['other bits the second time', editing('binary', x => scale(x, 1 + 1e-6 * (calls++ % 2)))],
    ['an input that is changed', editing('permute', (_, [x]) => scale(readF64(x) as Float64Array, 2))],
  ])('%s', async (_, backend) => {
    const error: Error = await checkPrograms(60, program => checkProgram(program, backend)).then(
      () => new Error('none was found'),
      cause => cause,
    )
    const [, text] = error.message.match(/^program \d+, reduced to ({.*?}): /) ?? [error.message, '{"steps":[]}']
    const program: Program = JSON.parse(text)
    expect(program.steps.length).toBeGreaterThan(0)
    expect(program.steps.length).toBeLessThan(4)
  })
})
