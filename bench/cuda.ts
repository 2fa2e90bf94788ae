/**
 * GPU performance as fractions of the card's measured peak.
 *
 *     pnpm bench cuda [--only launch,gemm,attention,decode,train,generate] [--config 1b] [--steps N] [--peers FILE,FILE] [--json FILE] [--tiny]
 *
 * Covers launch cost, matrix products, attention, decoding, a training step and text generation. Times are device times
 * (events), medians of repeats after a warm-up. `--peers` names files written by
 * `bench/peers/cuda_torch.py --json FILE` on the same card; its large product and copy are then the peaks. Otherwise,
 * the peak bandwidth is that of our own copy, and products have no peak. `--tiny` runs everything at small sizes, as a
 * smoke test. MOE_CUDA_WGMMA=1 uses Hopper products if available, MOE_CUDA_CUBLASLT=1 those of cuBLASLt;
 * `pnpm bench cuda-gemm` compares all three. The operands of products and attention are rounded to bf16 before the
 * measured part, because in a training step the op that produces them rounds them, and because PyTorch's operands are
 * bf16, too.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import { loadavg } from 'node:os'
import { parseArgs } from 'node:util'
import {
  dtypeBytes,
  fallbacks,
  namedParameters,
  type OpAttrs,
  type OpName,
  parameterCount,
  QuantizedParameter,
  Random,
  type Shape,
  setDefaultBackend,
  sizeOf,
  type TensorSpec,
  tensor,
  type Value,
} from '@moe/core'
import { DeepSeek, type DeepSeekOptions, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cuda'
import { AdamW, type TokenBatch, TrainingSteps } from '@moe/trainer'
import { bytesPerToken } from './shared/bytes-per-token.ts'
import { linears } from './shared/linears.ts'

const { values: options } = parseArgs({
  options: {
    only: { type: 'string', default: 'launch,gemm,attention,decode,train,generate' },
    config: { type: 'string', default: '1b' },
    steps: { type: 'string', default: '10' },
    peers: { type: 'string' },
    json: { type: 'string' },
    tiny: { type: 'boolean', default: false },
  },
})

/** One line of the table: `rate` in `unit`, its fraction of the card's peak, and its ratio to the peer's result of the same name. */
interface Result {
  readonly name: string
  readonly rate: number
  readonly unit: 'TFLOP/s' | 'GB/s' | 'us' | 'tokens/s'
  readonly fractionOfPeak?: number
  readonly ofPeer?: number
}

interface Peers {
  readonly versions: Record<string, string>
  readonly results: ReadonlyArray<{ readonly name: string; readonly rate: number; readonly unit: string }>
}

const backend = await createBackend()
setDefaultBackend(backend)
const peers = (options.peers?.split(',') ?? []).map(file => JSON.parse(readFileSync(file, 'utf8')) as Partial<Peers>)
const peerResults = peers.flatMap(peer => peer.results ?? [])
const peerRate = (name: string) => peerResults.find(result => result.name === name)?.rate
const results: Result[] = []
const repeats = options.tiny ? 2 : 20

const table = { ...backend.primitives, ...backend.fused } as Record<string, unknown>

/** Runs an op and frees its outputs. */
function runOp<O extends OpName>(
  op: O,
  inputs: readonly Value[],
  attrs: OpAttrs[O],
  outputs: readonly TensorSpec[],
): void {
  const kernel = table[op] as (i: readonly Value[], a: unknown, o: readonly TensorSpec[]) => unknown[] | undefined
  const handles = kernel(inputs, attrs, outputs)
  if (handles === undefined) throw new Error(`${op} declined`)
  for (const handle of handles) backend.free(handle)
}

const f32 = (shape: Shape): TensorSpec => ({ shape, dtype: 'f32' })

let seed = 1
/** Fills an array with random numbers, repeated with a period that divides no row; drawing all of them would take longer than the measurement. */
function repeated<A extends Float32Array | Uint16Array>(data: A, draw: (x: number) => number): A {
  const period = Math.min(data.length, 2 ** 20 + 7)
  data.set(new Random(seed++).uniform(period).map(draw))
  for (let done = period; done < data.length; done *= 2) data.copyWithin(done, 0, done)
  return data
}

function random(shape: Shape): Value {
  const data = repeated(new Float32Array(sizeOf(shape)), x => 2 * x - 1)
  return { handle: backend.upload(data, shape, 'f32'), shape, dtype: 'f32' }
}

/** Small numbers. */
function bf16Matrix(shape: Shape): Value {
  const data = repeated(new Uint16Array(sizeOf(shape)), x => 0x3f00 + 0x80 * x)
  return { handle: backend.upload(data, shape, 'bf16'), shape, dtype: 'bf16' }
}

function integers(values: readonly number[]): Value {
  const data = Int32Array.from(values)
  return { handle: backend.upload(data, [data.length], 'i32'), shape: [data.length], dtype: 'i32' }
}

function free(...values: readonly Value[]): void {
  for (const { handle } of values) backend.free(handle)
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}

/** Median milliseconds on the device. */
async function time(fn: () => void): Promise<number> {
  for (let i = 0; i < 3; i++) fn()
  const times: number[] = []
  for (let i = 0; i < repeats; i++) times.push(await backend.elapsed(fn))
  return median(times)
}

/** @param peerName the peer's name for the same measurement, if different */
function report(name: string, rate: number, unit: Result['unit'], peak?: number, peerName = name): void {
  const peer = peerRate(peerName)
  const lower = unit === 'us'
  const ofPeer = peer === undefined ? undefined : lower ? peer / rate : rate / peer
  const result = { name, rate, unit, fractionOfPeak: peak === undefined ? undefined : rate / peak, ofPeer }
  results.push(result)
  const share = result.fractionOfPeak === undefined ? '' : `${(100 * result.fractionOfPeak).toFixed(1)} % of peak`
  const ratio = ofPeer === undefined ? '' : `${ofPeer.toFixed(2)}x PyTorch`
  console.log(
    `${name.padEnd(44)} ${rate.toPrecision(4).padStart(9)} ${unit.padEnd(8)} ${share.padStart(16)} ${ratio.padStart(14)}`,
  )
  // Keep the results so far if the benchmark is interrupted.
  if (options.json !== undefined) save(options.json)
}

// --- peaks ---

const small = options.tiny ? 8 : 1
const matmulPeak = peerRate('peak: bf16 product') ?? undefined

async function copyPeak(): Promise<number> {
  const size = 2 ** 28 / (options.tiny ? 2 ** 12 : 1)
  const x = random([size])
  // An elementwise op reads and writes every byte once, as a copy does.
  const ms = await time(() => runOp('unary', [x], { code: 'neg' }, [f32([size])]))
  free(x)
  return (8 * size) / ms / 1e6
}

const ownCopy = await copyPeak()
const bandwidthPeak = peerRate('peak: copy') ?? ownCopy
report('copy (elementwise, 1 GiB)', ownCopy, 'GB/s', bandwidthPeak)

// --- launch cost ---

async function launches(): Promise<void> {
  const count = options.tiny ? 20 : 2000
  const x = random([32])
  const many = () => {
    for (let i = 0; i < count; i++) runOp('unary', [x], { code: 'neg' }, [f32([32])])
  }
  many()
  await backend.sync()
  const hostTimes: number[] = []
  for (let i = 0; i < 5; i++) {
    const started = performance.now()
    many()
    hostTimes.push((1000 * (performance.now() - started)) / count)
    await backend.sync()
  }
  report('launch: host time of an op', median(hostTimes), 'us')
  report('launch: device time of an op, eager', (1000 * (await time(many))) / count, 'us')
  const graph = backend.capture(many)
  report('launch: device time of an op, graph', (1000 * (await time(() => graph.replay()))) / count, 'us')
  const started = performance.now()
  for (let i = 0; i < 10; i++) graph.replay()
  report('launch: host time of an op, graph', (100 * (performance.now() - started)) / count, 'us')
  await backend.sync()
  graph.dispose()
  free(x)
}

// --- matrix products ---

async function products(): Promise<void> {
  const tokens = 4096 / small
  for (const [name, [full, wide]] of Object.entries(linears)) {
    const [k, n] = [full / small, wide / small]
    const [x, w, dy] = [random([tokens, k]), random([n, k]), random([tokens, n])]
    const flops = 2 * tokens * k * n
    for (const precision of ['bf16', 'fp8'] as const) {
      const attrs = { transposeA: false, transposeB: true, precision }
      const forward = await time(() => runOp('matmul', [x, w], attrs, [f32([tokens, n])]))
      report(`gemm ${precision}: ${name} forward`, flops / forward / 1e9, 'TFLOP/s', matmulPeak)
      const across = { transposeA: true, transposeB: false, precision }
      const weights = await time(() => runOp('matmul', [dy, x], across, [f32([n, k])]))
      report(`gemm ${precision}: ${name} dW`, flops / weights / 1e9, 'TFLOP/s', matmulPeak)
    }
    // The weight is read in place: the op that is closest to the product alone.
    const stored = bf16Matrix([n, k])
    const weight = { format: 'bf16', block: [1, 1], columns: k, transposeW: true, precision: 'bf16' } as const
    const read = await time(() => runOp('quantizedMatmul', [x, stored], weight, [f32([tokens, n])]))
    const peerName = `gemm bf16: ${name} forward`
    report(`gemm bf16: ${name} forward, weight in bf16`, flops / read / 1e9, 'TFLOP/s', matmulPeak, peerName)
    free(x, w, dy, stored)
  }
  const size = 4096 / small
  const [a, b] = [random([size, size]), random([size, size])]
  const exact = await time(() =>
    runOp('matmul', [a, b], { transposeA: false, transposeB: true, precision: 'f32' }, [f32([size, size])]),
  )
  report('gemm f32: 4096 square', (2 * size ** 3) / exact / 1e9, 'TFLOP/s')
  free(a, b)
  await grouped()
}

async function grouped(): Promise<void> {
  const [experts, rows, k, n] = [32, 1024 / small, 7168 / small, 2048 / small]
  const offsets = integers(Array.from({ length: experts + 1 }, (_, e) => e * rows))
  const [x, w, dy] = [random([experts * rows, k]), random([experts, n, k]), random([experts * rows, n])]
  const flops = 2 * experts * rows * k * n
  for (const precision of ['bf16', 'fp8'] as const) {
    const forward = await time(() =>
      runOp('groupedMatmul', [x, w, offsets], { transposeW: true, precision }, [f32([experts * rows, n])]),
    )
    report(`grouped gemm ${precision}: 32 experts x 1024 forward`, flops / forward / 1e9, 'TFLOP/s', matmulPeak)
    const weights = await time(() =>
      runOp('groupedMatmulWeightGrad', [x, dy, offsets], { precision }, [f32([experts, n, k])]),
    )
    report(`grouped gemm ${precision}: 32 experts x 1024 dW`, flops / weights / 1e9, 'TFLOP/s', matmulPeak)
  }
  free(x, w, dy, offsets)
  await routed()
}

/** The experts of a layer of `1b`, forward and backward: three products each, and three more for the weight gradients. */
async function routed(): Promise<void> {
  const [tokens, topK, experts, d, inner] = [8192 / small, 6, 64 / small, 1024 / small, 512 / small]
  const rows = tokens * topK
  const each = rows / experts
  const plan = [
    integers(Array.from({ length: rows }, (_, p) => (p % each) * experts + Math.floor(p / each))),
    integers(Array.from({ length: rows }, (_, slot) => (slot % experts) * each + Math.floor(slot / experts))),
    integers(Array.from({ length: experts + 1 }, (_, e) => e * each)),
  ]
  const shapes = [
    [tokens, d],
    [experts, inner, d],
    [experts, inner, d],
    [experts, d, inner],
    [tokens, topK],
  ]
  const inputs = [...shapes.map(random), ...plan]
  const dout = random([tokens, d])
  const saved = [0, 1].map(() => bf16Matrix([rows, inner]))
  const results = [f32([tokens, d]), ...saved.map(({ shape, dtype }) => ({ shape, dtype }))]
  const flops = 6 * rows * d * inner
  const needs = shapes.map(() => true)
  for (const precision of ['bf16', 'fp8'] as const) {
    const forward = await time(() => runOp('routedExperts', inputs, { precision, saves: true }, results))
    report(`routed experts ${precision}: 64 x 768 forward`, flops / forward / 1e9, 'TFLOP/s', matmulPeak)
    const back = await time(() =>
      runOp('routedExpertsBackward', [...inputs, ...saved, dout], { precision, needs }, shapes.map(f32)),
    )
    report(`routed experts ${precision}: 64 x 768 backward`, (2 * flops) / back / 1e9, 'TFLOP/s', matmulPeak)
  }
  free(...inputs, ...saved, dout)
}

// --- attention ---

async function attention(): Promise<void> {
  await attentionOf(16, 192, 128)
  await attentionOf(20, 256, 256)
}

async function attentionOf(heads: number, dk: number, dv: number): Promise<void> {
  const [batch, length] = [1, 8192 / small ** 2]
  const [q, k, v] = [
    random([batch, length, heads, dk]),
    random([batch, length, heads, dk]),
    random([batch, length, heads, dv]),
  ]
  const attrs = { causal: true, scale: dk ** -0.5, precision: 'bf16' } as const
  const outputs = [f32([batch, length, heads, dv]), f32([batch, heads, length])]
  const flops = (batch * heads * length * length * 2 * (dk + dv)) / 2
  const forward = await time(() => runOp('attention', [q, k, v], attrs, outputs))
  report(`attention forward: 8k, ${dk}/${dv}, causal`, flops / forward / 1e9, 'TFLOP/s', matmulPeak)
  const run = table['attention'] as (i: readonly Value[], a: unknown, o: readonly TensorSpec[]) => unknown[]
  const [out, lse] = run([q, k, v], attrs, outputs).map((handle, i) => ({ handle, ...outputs[i] }))
  const dout = random([batch, length, heads, dv])
  const backwardSpecs = [f32(q.shape), f32(k.shape), f32(v.shape)]
  const backward = await time(() => runOp('attentionBackward', [q, k, v, out, lse, dout], attrs, backwardSpecs))
  report(`attention backward: 8k, ${dk}/${dv}, causal`, (2.5 * flops) / backward / 1e9, 'TFLOP/s', matmulPeak)
  free(q, k, v, out, lse, dout)
}

async function decode(): Promise<void> {
  const [batch, length] = options.tiny ? [2, 64] : [64, 4096]
  const lengths = integers(new Array(batch).fill(length))
  const attrs = { scale: 192 ** -0.5, valueDim: 512, precision: 'bf16' } as const
  const shape = [batch, length, 576]
  for (const cache of [random(shape), bf16Matrix(shape)]) {
    for (const heads of options.tiny ? [16] : [16, 128]) {
      const q = random([batch, 1, heads, 576])
      const bytes = dtypeBytes[cache.dtype] * sizeOf(shape) + 4 * (sizeOf(q.shape) + batch * heads * 512)
      const name = `decode: absorbed, ${cache.dtype} cache, ${heads} heads, ${length} tokens, batch ${batch}`
      for (const page of [0, 64, 16]) {
        const pages = (batch * length) / page
        // The number of pages is a power of two, so any odd step reaches all of them.
        const table = page === 0 ? [] : [integers(Array.from({ length: pages }, (_, i) => (i * 1237) % pages))]
        const inPages = table.map(t => ({ ...t, shape: [batch, length / page] }))
        const rows = page === 0 ? cache : { ...cache, shape: [pages, page, 576] }
        const inputs = [q, rows, lengths, ...inPages]
        const ms = await time(() => runOp('latentAttention', inputs, attrs, [f32([batch, 1, heads, 512])]))
        report(page === 0 ? name : `${name}, pages of ${page}`, bytes / ms / 1e6, 'GB/s', bandwidthPeak)
        free(...table)
      }
      free(q)
    }
    free(cache)
  }
  free(lengths)
}

const configuration = options.tiny ? 'tiny' : options.config

/** A model with repeated random weights; drawing all of them would take half a minute. */
async function configured(made: DeepSeekOptions = {}): Promise<DeepSeek> {
  if (!Object.hasOwn(presets, configuration))
    throw new Error(`--config: expected one of ${Object.keys(presets).join(', ')}`)
  const preset = presets[configuration as keyof typeof presets]
  const config = { ...preset, max_position_embeddings: 4096, eos_token_id: null }
  const model = new DeepSeek(config, { ...made, seed: null })
  for (const { parameter } of namedParameters(model)) {
    const shape = parameter instanceof QuantizedParameter ? parameter.weight.shape : parameter.shape
    // Norms and biases keep their initial values.
    if (shape.length < 2) continue
    const values = repeated(new Float32Array(sizeOf(shape)), x => 0.07 * (x - 0.5))
    if (parameter instanceof QuantizedParameter) await parameter.assignValues(values)
    else parameter.assign(tensor(values, parameter.shape))
  }
  return model
}

// --- a training step ---

async function train(): Promise<void> {
  const [rows, length] = options.tiny ? [1, 16] : [8, 1024]
  const model = await configured()
  const parameters = namedParameters(model)
  const optimizer = new AdamW(parameters)
  const batch = randomBatch(rows, length + model.lookahead, model.vocabSize)
  console.log(`  ${configuration}: ${(parameterCount(model) / 1e9).toFixed(2)}B parameters`)
  for (const [precision, record] of [
    ['bf16', false],
    ['bf16', true],
    ['fp8', true],
  ] as const) {
    const steps = new TrainingSteps(model, parameters, optimizer, { clip: 1, precision, record })
    const step = async () => {
      const { loss } = await steps.step([batch], { lr: 1e-4 })
      await backend.sync()
      return loss
    }
    await step()
    await step()
    const seconds: number[] = []
    const before = backend.stats().launches
    let loss = 0
    for (let i = 0; i < (options.tiny ? 1 : Number(options.steps)); i++) {
      const started = performance.now()
      loss = await step()
      seconds.push((performance.now() - started) / 1000)
    }
    const kernels = (backend.stats().launches - before) / seconds.length
    const { peakBytes, peakReservedBytes } = backend.stats()
    const memory = `${(peakBytes / 2 ** 30).toFixed(1)} GiB peak tensor memory, ${(peakReservedBytes / 2 ** 30).toFixed(1)} reserved`
    console.log(`  ${kernels.toFixed(0)} launches per step, ${memory}, loss ${loss.toFixed(3)}`)
    const title = `train: ${configuration}, ${rows} x ${length}`
    const how = `${precision === 'bf16' ? '' : `${precision}, `}${record ? 'recorded' : 'op by op'}`
    report(`${title}, ${how}`, (rows * length) / median(seconds), 'tokens/s', undefined, title)
    steps.dispose()
  }
  model.dispose()
  const slow = fallbacks().filter(({ backend: who }) => who === backend.name)
  if (slow.length > 0)
    console.log(`  ops without their own kernel: ${slow.map(({ op, count }) => `${op} ${count}`).join(', ')}`)
}

// --- generation: prefill, then token by token, with bf16 weights ---

async function generate(): Promise<void> {
  const model = await configured({ weights: 'bf16' })
  const [length, tokens] = options.tiny ? [16, 6] : [1024, 128]
  const source = new Random(0)
  const prompt = Array.from({ length }, () => source.integer(model.vocabSize))
  const bytes = bytesPerToken(model)
  const [first, each]: number[][] = [[], []]
  for (let run = 0; run < 4; run++) {
    let before = performance.now()
    const times: number[] = []
    for await (const _ of model.generate(prompt, { maxTokens: tokens, cacheDtype: 'bf16' })) {
      const now = performance.now()
      times.push(now - before)
      before = now
    }
    // The first run loads the kernels; its second and third token are not replayed yet.
    if (run === 0) continue
    first.push(times[0])
    each.push(median(times.slice(3)))
  }
  report(`generate: ${configuration}, prompt of ${length}`, (1000 * length) / median(first), 'tokens/s')
  report(`generate: ${configuration}, bf16 weights, batch 1`, 1000 / median(each), 'tokens/s')
  report(`generate: ${configuration}, weights read`, bytes / median(each) / 1e6, 'GB/s', bandwidthPeak)
  model.dispose()
}

function randomBatch(rows: number, length: number, vocabulary: number): TokenBatch {
  const source = new Random(0)
  const tokens = Int32Array.from({ length: rows * length }, () => source.integer(vocabulary))
  return { tokens, documents: new Int32Array(rows * length), rows, length }
}

function save(path: string): void {
  const { name, capability, multiprocessors, totalMemory, driverVersion } = backend.properties
  const card = { name, capability, multiprocessors, totalMemory, driverVersion }
  const machine = {
    card,
    wgmma: backend.wgmma,
    cublasLt: backend.cublasLt,
    node: process.version,
    load: loadavg()[0],
    peers: peers[0]?.versions,
  }
  writeFileSync(path, `${JSON.stringify({ machine, date: new Date().toISOString(), results }, null, 2)}\n`)
}

const parts: Record<string, () => Promise<void>> = {
  launch: launches,
  gemm: products,
  attention,
  decode,
  train,
  generate,
}
for (const name of options.only.split(',')) {
  const part = parts[name]
  if (part === undefined) throw new Error(`--only: expected ${Object.keys(parts).join(', ')}`)
  // If one part cannot run here (memory, a missing kernel), the others still run.
  try {
    await part()
  } catch (error) {
    console.log(`${name} failed: ${error instanceof Error ? error.message : error}`)
    process.exitCode = 1
  }
}
backend.dispose()
