/**
 * Overhead of the engine per recorded op, without any kernel.
 *
 *     pnpm bench engine-overhead [--json FILE] [--seconds N]
 *
 * Measures checks, dispatch, recording and the backward pass. The backend of this benchmark answers every call at once
 * with the same handle, so all measured time is the engine's. The target is 0.5 µs per recorded op in the forward pass,
 * and the same per kernel call in the backward pass (a gradient rule makes one to five of them).
 */
import { writeFileSync } from 'node:fs'
import { cpus } from 'node:os'
import { parseArgs } from 'node:util'
import {
  type Backend,
  backward,
  dtypes,
  type FusedKernels,
  type FusedName,
  hostArray,
  noGrad,
  normalParameter,
  type Parameter,
  type PrimitiveKernels,
  type PrimitiveName,
  rmsNorm,
  scope,
  setDefaultBackend,
  sizeOf,
  swiglu,
  type Tensor,
  zeros,
} from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'

const { values: options } = parseArgs({
  options: { json: { type: 'string' }, seconds: { type: 'string', default: '1' } },
})
const goal = 0.5

const primitiveNames: PrimitiveName[] = [
  'unary',
  'binary',
  'compare',
  'where',
  'cast',
  'fill',
  'reduce',
  'cumsum',
  'topk',
  'matmul',
  'takeRows',
  'scatterAddRows',
  'setRows',
  'reshape',
  'permute',
  'expand',
  'slice',
  'pad',
  'concat',
]
const fusedNames: FusedName[] = [
  'softmax',
  'softmaxBackward',
  'rmsNorm',
  'rmsNormBackward',
  'swiglu',
  'swigluBackward',
  'rope',
  'mlaKeyValue',
  'mlaKeyValueBackward',
  'attention',
  'attentionBackward',
  'latentAttention',
  'indexScores',
  'indexScoresBackward',
  'crossEntropy',
  'crossEntropyBackward',
  'linearCrossEntropy',
  'linearCrossEntropyBackward',
  'routerTopk',
  'routerTopkBackward',
  'dispatchPlan',
  'permuteTokens',
  'permuteTokensBackward',
  'combineTokens',
  'combineTokensBackward',
  'routedExperts',
  'routedExpertsBackward',
  'groupedMatmul',
  'groupedMatmulWeightGrad',
  'adamwStep',
  'globalNorm',
  'quantize',
]

/** Kernel calls so far. */
let calls = 0

/** A backend without kernels. */
function nullBackend(): Backend {
  const handle = {}
  const answers = Array.from({ length: 5 }, (_, count) => new Array<object>(count).fill(handle))
  const kernel = (_inputs: unknown, _attrs: unknown, outputs: readonly unknown[]) => {
    calls++
    return answers[outputs.length]
  }
  const all = (names: readonly string[]) => Object.fromEntries(names.map(name => [name, kernel]))
  return {
    name: 'null',
    device: 'no kernels',
    dtypes: new Set(dtypes),
    bf16Matmul: true,
    fp8Matmul: true,
    upload: () => handle,
    download: async ({ shape, dtype }) => hostArray(dtype, sizeOf(shape)),
    free() {},
    async sync() {},
    stats: () => ({ handles: 0, bytes: 0, peakBytes: 0 }),
    dispose() {},
    primitives: all(primitiveNames) as unknown as PrimitiveKernels,
    fused: all(fusedNames) as unknown as FusedKernels,
  }
}

interface Result {
  readonly name: string
  /** Ops on the tape. */
  readonly recorded: number
  /** Kernel calls of the backward pass. */
  readonly backwardCalls: number
  /** Microseconds of the forward pass per recorded op. */
  readonly forward: number
  /** Microseconds of the backward pass per recorded op, including the calls of its gradient rule. */
  readonly backward: number
  /** Microseconds of the backward pass per kernel call. */
  readonly backwardPerCall: number
  /** Microseconds of the forward pass per op when nothing is recorded. */
  readonly unrecorded: number
}

const median = (values: number[]) => values.sort((a, b) => a - b)[values.length >> 1]

/** Times `forward` and the backward pass from its result, over many repetitions. */
function measure(name: string, forward: () => Tensor): Result {
  const forwardTimes: number[] = []
  const backwardTimes: number[] = []
  const unrecordedTimes: number[] = []
  let recorded = 0
  let backwardCalls = 0
  const round = () => {
    scope(() => {
      const before = tapeLength()
      const started = performance.now()
      const loss = forward()
      const middle = performance.now()
      recorded = tapeLength() - before - 1
      calls = 0
      const turned = performance.now()
      backward(loss)
      const ended = performance.now()
      backwardCalls = calls
      forwardTimes.push(middle - started)
      backwardTimes.push(ended - turned)
    })
    const started = performance.now()
    scope(() => noGrad(forward))
    unrecordedTimes.push(performance.now() - started)
    for (const parameter of parameters) parameter.zeroGrad()
  }
  for (let i = 0; i < 30; i++) round()
  for (const times of [forwardTimes, backwardTimes, unrecordedTimes]) times.length = 0
  const end = performance.now() + 1000 * Number(options.seconds)
  while (performance.now() < end || forwardTimes.length < 20) round()
  const perRecorded = (times: number[]) => (1000 * median(times)) / recorded
  const back = perRecorded(backwardTimes)
  return {
    name,
    recorded,
    backwardCalls,
    forward: perRecorded(forwardTimes),
    backward: back,
    backwardPerCall: (back * recorded) / backwardCalls,
    unrecorded: perRecorded(unrecordedTimes),
  }
}

/** Index of the next op on the tape. */
const tapeLength = () => probe.neg().node?.id ?? Number.NaN

setDefaultBackend(nullBackend())
const parameters: Parameter[] = []
const parameter = (...shape: number[]) => {
  const made = normalParameter(shape, 'weight')
  parameters.push(made)
  return made
}

const probe = parameter(1)
const vector = parameter(64)
const matrix = parameter(64, 64)
const other = zeros([64])
const length = 1000

/** Applies an op many times in a row. */
const chain = (first: Tensor, op: (x: Tensor) => Tensor) => () => {
  let x = first
  for (let i = 0; i < length; i++) x = op(x)
  return x.sum()
}

const rows = zeros([8, 64])
const results = [
  measure(
    'unary chain',
    chain(vector, x => x.tanh()),
  ),
  measure(
    'binary chain, two tensors',
    chain(vector, x => x.add(other)),
  ),
  measure(
    'binary chain, broadcast',
    chain(matrix, x => x.mul(vector)),
  ),
  measure(
    'binary chain, a number',
    chain(vector, x => x.mul(0.5)),
  ),
  measure(
    'reshape chain',
    chain(matrix, x => x.reshape(x.rank === 1 ? [64, 64] : [4096])),
  ),
  measure('block of linear, norm, gate', () => {
    let x: Tensor = rows
    for (let i = 0; i < 200; i++) {
      const normed = rmsNorm(x, vector, 1e-6)
      const gate = normed.matmul(matrix, { transposeB: true })
      x = x.add(swiglu(gate, normed.matmul(matrix, { transposeB: true })).matmul(matrix, { transposeB: true }))
    }
    return x.sum()
  }),
  measureModel(),
]

/** A whole training step of the 12.5M-parameter model, including its host-side batch work. */
function measureModel(): Result {
  const model = new DeepSeek(presets['12m'])
  const shape = { rows: 8, length: 256 + model.lookahead }
  const size = shape.rows * shape.length
  const batch = { ...shape, tokens: new Int32Array(size), documents: new Int32Array(size) }
  const result = measure("step of '12m'", () => model.loss(batch).loss)
  model.dispose()
  return result
}

const heads = [
  'µs per recorded op',
  'recorded',
  'forward',
  'backward',
  'backward calls',
  'µs per backward call',
  'not recorded',
]
const table = results.map(r => [
  r.name,
  String(r.recorded),
  r.forward.toFixed(2),
  r.backward.toFixed(2),
  String(r.backwardCalls),
  r.backwardPerCall.toFixed(2),
  r.unrecorded.toFixed(2),
])
const widths = heads.map((head, i) => Math.max(head.length, ...table.map(row => row[i].length)))
for (const row of [heads, ...table]) {
  console.log(row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i]) : cell.padStart(widths[i]))).join('  '))
}
const above = results.filter(r => r.forward > goal || r.backwardPerCall > goal)
console.log(
  above.length === 0
    ? `\nall within the goal of ${goal} µs`
    : `\nabove the goal of ${goal} µs: ${above.map(r => r.name).join(', ')}`,
)
if (options.json !== undefined) {
  const machine = { cpu: cpus()[0]?.model ?? 'unknown', node: process.version }
  writeFileSync(options.json, `${JSON.stringify({ machine, goal, results }, null, 2)}\n`)
}
