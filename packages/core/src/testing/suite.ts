/** @file The backend suite: the requirements on every backend, as a list of named checks for any test runner. */
import { backward, gradients } from '../autograd/backward.ts'
import type { Backend } from '../backend.ts'
import { fromHost, full, tensor } from '../create.ts'
import { dtypes, encodeHost } from '../dtype.ts'
import { isMoeError } from '../errors.ts'
import { adamwStep } from '../fused/adamw.ts'
import { runFused } from '../fused/definition.ts'
import { fusedDefinitions } from '../fused/index.ts'
import { Linear } from '../nn/layers.ts'
import type { FusedName, OpName, Precision, PrimitiveName } from '../ops.ts'
import { checkOptions } from '../options.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { scope } from '../scope.ts'
import { sizeOf } from '../shape.ts'
import { noGrad } from '../tape.ts'
import { run, type Tensor } from '../tensor.ts'
import type { CaseInput, OpCase } from './case.ts'
import { fusedCases } from './cases/fused.ts'
import { primitiveCases } from './cases/primitives.ts'
import { assertClose, normalizedError, tolerances } from './compare.ts'
import { fp8ErrorBounds } from './few-bits.ts'
import { checkProgram, checkPrograms, programCount } from './random-programs/check-program.ts'

/** One check of a suite, for any test runner: `test(check.name, check.run)`. */
export interface SuiteCheck {
  /** Unique within its suite. */
  readonly name: string
  /** Runs the check. Throws if it fails. */
  run(): Promise<void>
}

/** Options of `backendSuite`. */
export interface SuiteOptions {
  /**
   * Checks that the backend cannot pass, with the reason. An entry fails if it names no check, or if its check passes.
   */
  readonly skip?: ReadonlyArray<{ readonly reason: string; readonly checks: readonly string[] }>
  /** Throws if memory next to a buffer was written. Called after every op. */
  readonly guards?: (backend: Backend) => void
  /** How many bits of a sum the fp8 products keep; 14 on Hopper's tensor cores. Default: the 24 bits of f32. */
  readonly fp8Bits?: number
}

/** All op cases, as data. */
export const opCases: readonly OpCase[] = [...primitiveCases, ...fusedCases]

/** Returns the name of a case's check. */
export const caseName = (item: OpCase): string => `${item.op}: ${item.name}`

/**
 * Returns the checks of a backend. `make` is called once and all checks share the backend, so run them one after
 * another.
 *
 * Each op case compares values and gradients with the reference backend (f64), runs twice to compare bits, and looks
 * for changed inputs and leaked handles. Further checks cover storage, errors, lifetimes, a small training loop and
 * random programs: 10, or as many as the environment variable MOE_RANDOM_PROGRAMS says.
 */
export function backendSuite(make: () => Promise<Backend>, options: SuiteOptions = {}): SuiteCheck[] {
  checkOptions('backendSuite', options, { skip: true, guards: true, fp8Bits: true })
  let backend: Promise<Backend> | null = null
  const get = () => (backend ??= make())
  const checks: SuiteCheck[] = [
    ...opCases.map(item => ({ name: caseName(item), run: async () => checkCase(await get(), item, options) })),
    ...dtypes.map(dtype => ({
      name: `storage: ${dtype} is uploaded and downloaded unchanged`,
      run: async () => checkStorage(await get(), dtype),
    })),
    { name: 'errors: an unsupported dtype is rejected', run: async () => checkUnsupported(await get()) },
    { name: 'lifetimes: reshape shares memory', run: async () => checkSharing(await get()) },
    { name: 'lifetimes: a tensor can be freed while it is downloaded', run: async () => checkReading(await get()) },
    { name: 'lifetimes: donation in setRows leaves aliases unchanged', run: async () => checkDonation(await get()) },
    { name: 'training: a linear model learns and leaks nothing', run: async () => checkTraining(await get()) },
    { name: 'programs: random programs agree with the reference', run: async () => checkRandom(await get(), options) },
  ]
  const skipped = new Map(
    (options.skip ?? []).flatMap(({ reason, checks: names }) => names.map(name => [name, reason])),
  )
  for (const name of skipped.keys()) {
    if (!checks.some(check => check.name === name)) throw new Error(`unknown check in skip: ${name}`)
  }
  return checks.map(check => {
    const reason = skipped.get(check.name)
    return reason === undefined
      ? check
      : { name: `${check.name} (expected failure: ${reason})`, run: () => mustFail(check) }
  })
}

async function checkRandom(backend: Backend, { guards }: SuiteOptions): Promise<void> {
  await checkPrograms(programCount(), async program => {
    await checkProgram(program, backend)
    guards?.(backend)
  })
}

async function mustFail(check: SuiteCheck): Promise<void> {
  try {
    await check.run()
  } catch {
    return
  }
  throw new Error(`${check.name} is skipped but passes; remove it from the skip list`)
}

// --- one op ---

/** Creates the same input values on any backend. */
function makeInput(item: OpCase, index: number, spec: CaseInput, backend: Backend): Tensor {
  const size = sizeOf(spec.shape)
  const random = new Random(7).fork(`${item.op}/${item.name}/${index}`)
  const { low = 0, high = 1 } = spec
  let values: ArrayLike<number>
  if (spec.values !== undefined) values = spec.values
  else if (spec.random === 'normal') values = random.normal(size)
  else if (spec.random === 'integer') values = Int32Array.from({ length: size }, () => low + random.integer(high - low))
  else values = random.uniform(size).map(x => low + (high - low) * x)
  return fromHost(encodeHost(spec.dtype, values), spec.shape, spec.dtype, backend)
}

function runCase(item: OpCase, inputs: readonly Tensor[], backend: Backend): Tensor[] {
  const { op, attrs } = item
  if (op in fusedDefinitions) return runFused(fusedDefinitions[op as FusedName] as never, inputs, attrs as never)
  if (op === 'fill')
    return [full(item.outShape as number[], (attrs as { value: number }).value, { dtype: item.outDtype, backend })]
  if (item.outShape === undefined && op !== 'topk') return [run(op as 'unary', inputs, attrs as never)]
  const [x] = inputs
  switch (op as PrimitiveName) {
    case 'topk': {
      const { values, indices } = x.topk((attrs as { k: number }).k)
      return [values, indices]
    }
    case 'reshape':
      return [x.reshape(item.outShape as number[])]
    case 'expand':
      return [x.expand(item.outShape as number[])]
    case 'slice':
      return [x.slice((attrs as { starts: number[] }).starts, item.outShape as number[])]
    case 'pad': {
      const { before, value } = attrs as { before: number[]; value: number }
      return [
        x.pad(
          before,
          (item.outShape as number[]).map((size, i) => size - before[i] - x.shape[i]),
          value,
        ),
      ]
    }
    default:
      throw new Error(`the suite cannot run ${op}`)
  }
}

interface CaseResult {
  readonly outputs: ArrayLike<number>[]
  readonly gradients: Array<ArrayLike<number> | null>
}

/** Ops that use up inputs, for which unchanged inputs cannot be checked. */
const donating = new Set<OpName>(['adamwStep', 'emaStep'])

async function evaluate(
  item: OpCase,
  backend: Backend,
  options: SuiteOptions,
  withGradient: boolean,
): Promise<CaseResult> {
  const made: Tensor[] = []
  try {
    const inputs: Tensor[] = []
    for (const [i, spec] of item.inputs.entries()) {
      inputs.push(makeInput(item, i, spec, backend))
      made.push(inputs[i])
    }
    const before = donating.has(item.op) ? [] : await Promise.all(inputs.map(input => input.values()))
    const outputs = scope(() => noGrad(() => runCase(item, inputs, backend)))
    made.push(...outputs)
    options.guards?.(backend)
    const values = await Promise.all(outputs.map(output => output.values()))
    const grads = withGradient ? await gradientsOf(item, inputs, backend) : []
    options.guards?.(backend)
    const after = donating.has(item.op) ? [] : await Promise.all(inputs.map(input => input.values()))
    after.forEach((now, i) => {
      assertClose(`input ${i} was changed`, now, before[i], tolerances.exact)
    })
    return { outputs: values, gradients: grads }
  } finally {
    for (const t of made) t.dispose()
  }
}

/**
 * Returns the gradients of sum(outputs * fixed random weights) with respect to every f32 input; then, of an op with
 * several differentiable outputs, those of each output alone, because a gradient rule gets null for the others.
 */
async function gradientsOf(item: OpCase, inputs: readonly Tensor[], backend: Backend) {
  const found = scope(() => {
    const leaves = inputs.map(input => {
      const leaf = input.detach()
      leaf.tracked = input.dtype === 'f32'
      return leaf
    })
    // A recorded identity turns each leaf into a tensor whose gradient `gradients` can return.
    const probes = leaves.map(leaf => (leaf.tracked ? leaf.reshape([...leaf.shape, 1]).reshape(leaf.shape) : leaf))
    const losses = runCase(item, probes, backend)
      .filter((output, i) => output.tracked && differentiable(item.op, i))
      .map((output, i) => {
        const weights = new Random(11).fork(`${item.op}/${item.name}/${i}`).normal(output.size)
        return output.mul(tensor(weights, output.shape, { backend })).sum()
      })
    const total = losses.reduce((sum, part) => sum.add(part))
    const all = losses.length > 1 ? [total, ...losses] : [total]
    return all.flatMap(loss => gradients(loss, probes, { retainGraph: loss !== all.at(-1) }))
  })
  const values = await Promise.all(found.map(async gradient => (gradient === null ? null : gradient.values())))
  for (const gradient of found) gradient?.dispose()
  return values
}

const withStatistics = new Set<OpName>(['rmsNorm', 'attention', 'crossEntropy', 'linearCrossEntropy', 'routedExperts'])

/** Statistics that fused ops pass to their own backward pass have no gradient. */
function differentiable(op: OpName, output: number): boolean {
  return output === 0 || !withStatistics.has(op)
}

function hasGradient(item: OpCase): boolean {
  const integers = item.op === 'compare' || item.op === 'dispatchPlan' || item.op === 'fill'
  return item.gradient ?? (!integers && item.inputs.some(({ dtype }) => dtype === 'f32'))
}

const references = new WeakMap<OpCase, Map<string, Promise<CaseResult>>>()

/** Returns what a case is compared with. It is computed once for all backends of a process. */
function onceFor(item: OpCase, variant: string, compute: () => Promise<CaseResult>): Promise<CaseResult> {
  const known = references.get(item) ?? new Map<string, Promise<CaseResult>>()
  references.set(item, known)
  const result = known.get(variant) ?? compute()
  known.set(variant, result)
  return result
}

async function checkCase(backend: Backend, item: OpCase, options: SuiteOptions): Promise<void> {
  const used = [
    ...item.inputs.map(({ dtype }) => dtype),
    ...(item.op === 'cast' ? [(item.attrs as { dtype: never }).dtype] : []),
    ...(item.outDtype === undefined ? [] : [item.outDtype]),
  ]
  if (item.op === 'quantize') used.push('f8e4m3')
  if (used.some(dtype => !backend.dtypes.has(dtype))) return expectRefusal(backend, item)
  const handles = backend.stats().handles
  const withGradient = hasGradient(item)
  const { precision } = item.attrs as { precision?: Precision }
  const wider = precision === 'fp8' && !backend.fp8Matmul
  const expected = await onceFor(item, wider ? 'f32' : 'as it is', () => {
    const expectedItem = wider ? ({ ...item, attrs: { ...item.attrs, precision: 'f32' } } as OpCase) : item
    return evaluate(expectedItem, referenceBackend(), {}, withGradient)
  })
  const { fp8Bits = 24 } = options
  const rounds = precision === 'fp8' && !wider
  const bounds = rounds
    ? await onceFor(item, `${fp8Bits} bits`, () => evaluate(item, fp8ErrorBounds(fp8Bits), {}, withGradient))
    : undefined
  const actual = await evaluate(item, backend, options, withGradient)
  const again = await evaluate(item, backend, options, withGradient)
  const { tolerance = tolerances.elementwise, gradientTolerance = tolerances.gradient } = item
  const rough = precision === 'bf16' || wider
  expected.outputs.forEach((output, i) => {
    if (item.compared !== undefined && !item.compared.includes(i)) return
    const allowed = output instanceof Float32Array ? tolerance : tolerances.exact
    assertClose(`output ${i}`, actual.outputs[i], output, allowed, bounds?.outputs[i])
    if (rough) assertSmall(`output ${i}`, normalizedError(actual.outputs[i], output))
    assertClose(`output ${i}, second run`, again.outputs[i], actual.outputs[i], tolerances.exact)
  })
  const count = item.inputs.length
  expected.gradients.forEach((wanted, i) => {
    const found = actual.gradients[i]
    const alone = i >= count
    const label = `gradient of input ${i % count}${alone ? ` from output ${Math.floor(i / count) - 1} alone` : ''}`
    if (wanted === null && found === null) return
    if (!alone && (wanted === null || found === null))
      throw new Error(`${label} is ${found === null ? 'missing' : 'unexpected'}`)
    // An output may not depend on the input. A rule may return zeros then.
    const zeros = new Float32Array((wanted ?? found)?.length ?? 0)
    const [own, gradient] = [found ?? zeros, wanted ?? zeros]
    assertClose(label, own, gradient, gradientTolerance, bounds?.gradients[i] ?? undefined)
    if (rough) assertSmall(label, normalizedError(own, gradient))
    assertClose(`${label}, second run`, again.gradients[i] ?? zeros, own, tolerances.exact)
  })
  const left = backend.stats().handles
  if (left !== handles) throw new Error(`${left - handles} handles leaked`)
}

function assertSmall(label: string, error: number): void {
  if (!(error < 1e-3)) throw new Error(`${label}: normalized mean square error ${error.toPrecision(3)}, allowed 1e-3`)
}

async function expectRefusal(backend: Backend, item: OpCase): Promise<void> {
  try {
    await evaluate(item, backend, {}, false)
  } catch (error) {
    if (isMoeError(error, 'E_UNSUPPORTED')) return
    throw error
  }
  throw new Error(`${backend.name} does not list the dtype, but ran the op`)
}

// --- storage, errors, lifetimes ---

async function checkStorage(backend: Backend, dtype: (typeof dtypes)[number]): Promise<void> {
  const data = encodeHost(dtype, [0, 1, 2, 3, 100, 7])
  if (!backend.dtypes.has(dtype)) return
  const handles = backend.stats().handles
  using x = fromHost(data, [2, 3], dtype, backend)
  data.fill(0)
  const down = await x.data()
  assertClose('elements', down, encodeHost(dtype, [0, 1, 2, 3, 100, 7]), tolerances.exact)
  if (down.constructor !== data.constructor) throw new Error(`${dtype} was downloaded as ${down.constructor.name}`)
  x.dispose()
  if (backend.stats().handles !== handles) throw new Error('the handle leaked')
}

async function checkUnsupported(backend: Backend): Promise<void> {
  using x = tensor([1, 2, 3], [3], { backend })
  for (const dtype of dtypes) {
    if (backend.dtypes.has(dtype)) continue
    try {
      x.cast(dtype).dispose()
    } catch (error) {
      if (isMoeError(error, 'E_UNSUPPORTED')) continue
      throw error
    }
    throw new Error(`a cast to the unsupported dtype ${dtype} did not throw`)
  }
}

async function checkSharing(backend: Backend): Promise<void> {
  const handles = backend.stats().handles
  const x = tensor([1, 2, 3, 4, 5, 6], [2, 3], { backend })
  const y = x.reshape([3, 2])
  x.dispose()
  assertClose('elements after the first owner is gone', await y.values(), [1, 2, 3, 4, 5, 6], tolerances.exact)
  y.dispose()
  if (backend.stats().handles !== handles) throw new Error('handles leaked')
}

async function checkReading(backend: Backend): Promise<void> {
  const handles = backend.stats().handles
  const x = tensor([1, 2, 3, 4], [4], { backend })
  const sum = scope(() => x.add(x))
  const reads = [sum.values(), x.values(), sum.values()]
  sum.dispose()
  x.dispose()
  // These tensors may reuse the freed memory.
  scope(() => {
    full([4], 7, { backend }).add(full([4], 1, { backend }))
  })
  const [first, own, second] = await Promise.all(reads)
  assertClose('the sum', first, [2, 4, 6, 8], tolerances.exact)
  assertClose('the sum again', second, [2, 4, 6, 8], tolerances.exact)
  assertClose('the uploaded tensor', own, [1, 2, 3, 4], tolerances.exact)
  if (backend.stats().handles !== handles) throw new Error('handles leaked')
}

async function checkDonation(backend: Backend): Promise<void> {
  const handles = backend.stats().handles
  const x = tensor([1, 2, 3, 4], [4], { backend })
  const alias = x.reshape([2, 2])
  const index = tensor(Int32Array.of(1), [1], { backend })
  const source = tensor([9], [1], { backend })
  const [out] = [run('setRows', [x, index, source], { donate: true })]
  assertClose('rows', await out.values(), [1, 9, 3, 4], tolerances.exact)
  assertClose('an alias of the donated tensor', await alias.values(), [1, 2, 3, 4], tolerances.exact)
  for (const t of [x, alias, index, source, out]) t.dispose()
  if (backend.stats().handles !== handles) throw new Error('handles leaked')
}

async function checkTraining(backend: Backend): Promise<void> {
  const handles = backend.stats().handles
  const random = new Random(3)
  const model = new Linear(4, 2, { random, backend })
  const x = tensor(random.normal(64), [16, 4], { backend })
  const truth = tensor(random.normal(8), [2, 4], { backend })
  const y = scope(() => x.matmul(truth, { transposeB: true }))
  let m = full([2, 4], 0, { backend })
  let v = full([2, 4], 0, { backend })
  const one = full([], 1, { backend })
  const losses: number[] = []
  for (let step = 1; step <= 40; step++) {
    const loss = scope(() => {
      const error = model.forward(x).sub(y)
      const mean = error.mul(error).mean()
      const result = mean.detach()
      backward(mean)
      return result
    })
    losses.push(await loss.item())
    loss.dispose()
    const attrs = { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0, step }
    const next = adamwStep(model.weight, model.weight.grad as Tensor, m, v, one, attrs)
    model.weight.assign(next.param)
    m.dispose()
    v.dispose()
    m = next.m
    v = next.v
    model.weight.zeroGrad()
  }
  if (!(losses[39] < losses[0] / 10)) throw new Error(`the loss went from ${losses[0]} to ${losses[39]}`)
  for (const t of [x, truth, y, m, v, one, model.weight]) t.dispose()
  const left = backend.stats().handles
  if (left !== handles) throw new Error(`${left - handles} handles leaked`)
}
