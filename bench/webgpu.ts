/**
 * Performance of a GPU through WebGPU.
 *
 *     pnpm bench webgpu [--json FILE] [--tiny] [--software]
 *
 * Covers memory, products, attention, a training step and a generated token of `12m`. Runs in Node with the package
 * `webgpu` (npm install webgpu, or MOE_WEBGPU). Times are measured on the host: many launches followed by a wait,
 * divided by their number; the minimum of several rounds. `--tiny` runs everything at small sizes, as a smoke test.
 * `--software` uses a software GPU, whose times are meaningless.
 */
import { parseArgs } from 'node:util'
import {
  fallbacks,
  namedParameters,
  type OpAttrs,
  type OpName,
  Random,
  setDefaultBackend,
  type TensorSpec,
  type Value,
} from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-webgpu'
import { AdamW, TrainingSteps } from '@moe/trainer'
import { median, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    json: { type: 'string' },
    tiny: { type: 'boolean', default: false },
    software: { type: 'boolean', default: false },
  },
})
const small = options.tiny ? 32 : 1
const rounds = options.tiny ? 1 : 5
const backend = await createBackend({ software: options.software })
setDefaultBackend(backend)
console.log(backend.device)

interface Result {
  readonly name: string
  readonly value: number
  readonly unit: string
}
const results: Result[] = []

function report(name: string, value: number, unit: string): void {
  results.push({ name, value, unit })
  console.log(`${name.padEnd(52)} ${value.toPrecision(4).padStart(9)} ${unit}`)
}

const f32 = (...shape: number[]): TensorSpec => ({ shape, dtype: 'f32' })
const random = new Random(1)
/** Numbers from a small set, repeated. */
function input(...shape: number[]): Value {
  const numbers = random.uniform(4096)
  const size = shape.reduce((product, n) => product * n, 1)
  return {
    handle: backend.upload(
      Float32Array.from({ length: size }, (_, i) => numbers[i % 4096] - 0.5),
      shape,
      'f32',
    ),
    ...f32(...shape),
  }
}
const integers = (...values: number[]): Value => ({
  handle: backend.upload(Int32Array.from(values), [values.length], 'i32'),
  shape: [values.length],
  dtype: 'i32',
})
const free = (...values: readonly Value[]) => {
  for (const { handle } of values) if (handle !== null) backend.free(handle)
}

const table = { ...backend.primitives, ...backend.fused } as unknown as Record<
  string,
  (inputs: readonly Value[], attrs: unknown, outputs: readonly TensorSpec[]) => Value['handle'][] | undefined
>

/** Seconds per run of an op. */
async function time<O extends OpName>(
  op: O,
  inputs: readonly Value[],
  attrs: OpAttrs[O],
  outputs: readonly TensorSpec[],
) {
  const once = () => {
    const handles = table[op](inputs, attrs, outputs)
    if (handles === undefined) throw new Error(`${op} was declined`)
    for (const handle of handles) if (handle !== null) backend.free(handle)
  }
  const inRow = async (count: number) => {
    const started = performance.now()
    for (let i = 0; i < count; i++) once()
    await backend.sync()
    return (performance.now() - started) / 1000
  }
  const first = await inRow(1)
  const again = await inRow(1)
  // Enough runs for about a tenth of a second.
  const count = options.tiny ? 1 : Math.max(1, Math.min(1000, Math.round(0.1 / Math.min(first, again))))
  const times: number[] = []
  for (let round = 0; round < rounds; round++) times.push((await inRow(count)) / count)
  return Math.min(...times)
}

async function memory(): Promise<void> {
  const x = input((2 ** 24 / small) | 0)
  const seconds = await time('unary', [x], { code: 'neg' }, [x])
  report('copy', (2 * 4 * x.shape[0]) / seconds / 1e9, 'GB/s')
  free(x)
  const one = input(1)
  report('launch', 1e6 * (await time('unary', [one], { code: 'neg' }, [one])), 'us')
  free(one)
}

async function products(): Promise<void> {
  const attrs = { transposeA: false, transposeB: true, precision: 'f32' } as const
  for (const full of [512, 1024, 2048, 4096]) {
    const size = full / small
    const [a, b] = [input(size, size), input(size, size)]
    report(
      `matmul ${size} square`,
      (2 * size ** 3) / (await time('matmul', [a, b], attrs, [f32(size, size)])) / 1e9,
      'GFLOP/s',
    )
    free(a, b)
  }
  const [n, k] = [8192 / small, 4096 / small]
  const weight = input(n, k)
  for (const rows of [1, 4]) {
    const x = input(rows, k)
    const seconds = await time('matmul', [x, weight], attrs, [f32(rows, n)])
    report(`matmul ${rows} x ${k} with ${n} x ${k}`, (4 * n * k) / seconds / 1e9, 'GB/s')
    free(x)
  }
  free(weight)
  const [experts, rows, inner, hidden] = [32, 4096 / small, 1024 / small, 512 / small]
  const [x, stack] = [input(rows, inner), input(experts, hidden, inner)]
  const offsets = integers(...Array.from({ length: experts + 1 }, (_, e) => Math.floor((rows * e) / experts)))
  const grouped = { transposeW: true, precision: 'f32' } as const
  const seconds = await time('groupedMatmul', [x, stack, offsets], grouped, [f32(rows, hidden)])
  report(
    `groupedMatmul ${experts} experts of ${rows / experts} rows`,
    (2 * rows * inner * hidden) / seconds / 1e9,
    'GFLOP/s',
  )
  free(x, stack, offsets)
}

async function attention(): Promise<void> {
  const [times, heads, width, valueWidth] = [2048 / small, 8, 192, 128]
  const [q, k, v] = [input(1, times, heads, width), input(1, times, heads, width), input(1, times, heads, valueWidth)]
  const attrs = { causal: true, scale: width ** -0.5, precision: 'f32' } as const
  const [y, lse] = [f32(1, times, heads, valueWidth), f32(1, heads, times)]
  const flops = times * times * heads * (width + valueWidth)
  report(
    `attention forward, ${times} of ${heads} heads, 192/128`,
    flops / (await time('attention', [q, k, v], attrs, [y, lse])) / 1e9,
    'GFLOP/s',
  )
  const found = table['attention']([q, k, v], attrs, [y, lse]) ?? []
  const [out, sums] = [y, lse].map((spec, i) => ({ ...spec, handle: found[i] }) as Value)
  const dout = input(1, times, heads, valueWidth)
  const backward = await time('attentionBackward', [q, k, v, out, sums, dout], attrs, [q, k, v])
  report(`attention backward`, (2.5 * flops) / backward / 1e9, 'GFLOP/s')
  free(q, k, v, out, sums, dout)
}

async function model(): Promise<void> {
  const name = options.tiny ? 'tiny' : '12m'
  const made = new DeepSeek(presets[name])
  const named = namedParameters(made)
  const steps = new TrainingSteps(made, named, new AdamW(named))
  const [rows, length] = [options.tiny ? 1 : 8, (options.tiny ? 16 : 256) + made.lookahead]
  const step = async () => {
    const tokens = Int32Array.from({ length: rows * length }, () => random.integer(made.vocabSize))
    const started = performance.now()
    await steps.step([{ rows, length, tokens, documents: new Int32Array(rows * length) }], { lr: 1e-3 })
    await backend.sync()
    return (performance.now() - started) / 1000
  }
  // The first step compiles the kernels; from the fifth on, buffers are reused in the same places.
  for (let i = 0; i < (options.tiny ? 1 : 5); i++) await step()
  const seconds: number[] = []
  for (let i = 0; i < rounds; i++) seconds.push(await step())
  report(`training, ${name}`, (rows * (length - made.lookahead)) / median(seconds), 'tokens/s')
  steps.dispose()
  const maxTokens = options.tiny ? 4 : 100
  let started = 0
  for (let round = 0; round < 2; round++) {
    started = performance.now()
    for await (const _ of made.generate([1, 2, 3], { maxTokens }));
  }
  report(`generating, ${name}`, (1000 * maxTokens) / (performance.now() - started), 'tokens/s')
  made.dispose()
}

await memory()
await products()
await attention()
await model()
const slow = fallbacks().filter(({ backend: name }) => name === backend.name)
if (slow.length > 0) console.log(`ops without their own kernel: ${slow.map(({ op }) => op).join(', ')}`)
writeResults(options.json, { device: backend.device, date: new Date().toISOString(), results })
backend.dispose()
