/**
 * Decoding at batch 1: tokens per second with weights in f32, bf16, int8 and int4, and what share of the machine's read bandwidth
 * that is, beside transformers' generate where `.venv-reference` exists.
 *
 *     pnpm bench decode [--config 200m] [--weights f32,bf16,int8,int4] [--tokens N] [--rounds N] [--json FILE] [--no-peers] [--profile]
 *
 * Every variant is a process with the model in memory; they take turns, one run of N tokens each per round. A run's time per token
 * is its median over the tokens, and the table shows the median over the rounds. Read bandwidth is measured between the
 * rounds by the faster of two ops that read 256 MiB with all threads (largest element, root of the sum of squares). The last columns are
 * what the weights take, and the whole process.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, writeFileSync } from 'node:fs'
import { cpus, loadavg, totalmem } from 'node:os'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import {
  fallbacks,
  globalNorm,
  namedParameters,
  noGrad,
  ones,
  QuantizedParameter,
  setDefaultBackend,
  type WeightFormat,
  weightBytes,
} from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend, profile, startProfile, stopProfile } from '@moe/kernels-cpu'

const root = fileURLToPath(new URL('..', import.meta.url))
const python = `${root}.venv-reference/bin/python`

const { values: options } = parseArgs({
  options: {
    config: { type: 'string', default: '200m' },
    weights: { type: 'string', default: 'f32,bf16,int8,int4' },
    tokens: { type: 'string', default: '32' },
    rounds: { type: 'string', default: '5' },
    json: { type: 'string' },
    peers: { type: 'boolean', default: true },
    profile: { type: 'boolean', default: false },
    worker: { type: 'string' },
  },
  allowNegative: true,
})
const tokens = Number(options.tokens)
const prompt = Array.from({ length: 16 }, (_, i) => 7 + 3 * i)

/** What a process says when its model is ready. */
interface Ready {
  readonly device: string
  /** Bytes of all weights, and of those that one token reads. */
  readonly weightBytes: number
  readonly bytesPerToken: number
  readonly residentBytes: number
}

// --- the processes that measure: a line in, a line of JSON out ---

/** Bytes of weights that a token reads: the chosen experts of each layer, one row of the embedding, everything else. */
function bytesPerToken(model: DeepSeek): number {
  const { num_experts_per_tok: chosen, n_routed_experts: experts } = model.config
  let bytes = 0
  for (const { name, parameter, slices } of namedParameters(model)) {
    if (name.startsWith('model.embed_tokens') && model.lm_head.weight !== parameter) continue
    const { bytes: all, elements } = weightBytes(parameter)
    // Decoding uses a copy of kv_b_proj cut by head, in bf16 where weights are stored in fewer bits.
    if (name.includes('kv_b_proj')) bytes += elements * (parameter instanceof QuantizedParameter ? 2 : 4)
    else bytes += slices === undefined ? all : (all * (chosen as number)) / (experts as number)
  }
  return bytes
}

async function work(weights: string): Promise<void> {
  const backend = await createBackend()
  setDefaultBackend(backend)
  const preset = presets[options.config as keyof typeof presets]
  const model = new DeepSeek(preset, { weights: weights === 'f32' ? undefined : (weights as WeightFormat) })
  backend.trim()
  const reply = (value: object) => process.stdout.write(`${JSON.stringify(value)}\n`)
  /** Milliseconds of each token after the first, which includes the prompt. */
  const run = async (): Promise<number[]> => {
    const times: number[] = []
    let before = performance.now()
    for await (const _ of model.generate(prompt, { maxTokens: tokens + 1, speculative: false })) {
      const now = performance.now()
      times.push(now - before)
      before = now
    }
    return times.slice(1)
  }
  await run()
  const ready: Ready = {
    device: backend.device,
    weightBytes: weightBytes(model).bytes,
    bytesPerToken: bytesPerToken(model),
    residentBytes: process.memoryUsage().rss,
  }
  reply(ready)
  for await (const line of createInterface({ input: process.stdin })) {
    if (line !== 'run') break
    if (options.profile) startProfile()
    reply(await run())
    if (options.profile) printProfile(weights)
  }
  const slow = fallbacks().filter(({ backend: name }) => name === backend.name)
  if (slow.length > 0) console.error(`without a kernel of their own: ${slow.map(({ op }) => op).join(', ')}`)
  process.exit(0)
}

function printProfile(weights: string): void {
  stopProfile()
  console.error(`${weights}: calls and microseconds per token`)
  for (const { op, calls, milliseconds } of profile()) {
    if (calls > 0) {
      const each = ((1000 * milliseconds) / tokens).toFixed(0)
      console.error(`  ${op.padEnd(24)} ${(calls / tokens).toFixed(1).padStart(7)} ${each.padStart(8)}`)
    }
  }
}

// --- the process that compares ---

class Runner {
  readonly label: string
  readonly runs: number[][] = []
  ready: Partial<Ready> = {}
  readonly #child: ChildProcess
  readonly #lines: AsyncIterator<string>

  constructor(label: string, command: string, args: readonly string[]) {
    this.label = label
    this.#child = spawn(command, args, { cwd: root, stdio: ['pipe', 'pipe', 'inherit'] })
    this.#lines = createInterface({ input: this.#child.stdout as NodeJS.ReadableStream })[Symbol.asyncIterator]()
  }

  async #next<T>(): Promise<T> {
    const { value, done } = await this.#lines.next()
    if (done) throw new Error(`${this.label} ended early`)
    return JSON.parse(value) as T
  }

  async start(): Promise<void> {
    this.ready = await this.#next()
  }

  async run(): Promise<void> {
    this.#child.stdin?.write('run\n')
    this.runs.push(await this.#next())
  }

  stop(): void {
    this.#child.stdin?.end()
  }
}

const median = (values: readonly number[]) => {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}

/** GB/s of one pass over 256 MiB, by the faster of two ops. */
async function readBandwidth(): Promise<() => number> {
  const backend = await createBackend()
  const big = ones([64 << 20], { backend })
  return () => {
    const timed = [() => globalNorm([big]), () => big.max()].map(op => {
      const started = performance.now()
      noGrad(op).dispose()
      return performance.now() - started
    })
    return (big.size * 4) / 1e6 / Math.min(...timed)
  }
}

async function compare() {
  const own = options.weights.split(',')
  const runners = own.map(weights => {
    const flags = ['--worker', weights, '--config', options.config, '--tokens', options.tokens]
    if (options.profile) flags.push('--profile')
    return new Runner(`@moe ${weights}`, process.execPath, [fileURLToPath(import.meta.url), ...flags])
  })
  if (options.peers && existsSync(python)) {
    for (const dtype of ['f32', 'bf16']) {
      const flags = ['--config', options.config, '--dtype', dtype, '--tokens', options.tokens]
      runners.push(new Runner(`transformers ${dtype}`, python, [`${root}bench/peers/decode_transformers.py`, ...flags]))
    }
  } else if (options.peers) {
    console.error('no .venv-reference: transformers is left out (docs say how to make one)')
  }
  for (const runner of runners) await runner.start()
  const bandwidth = await readBandwidth()
  const reads: number[] = [bandwidth()]
  for (let round = 0; round < Number(options.rounds); round++) {
    for (const runner of runners) await runner.run()
    reads.push(...[1, 2, 3].map(bandwidth))
  }
  for (const runner of runners) runner.stop()
  const readGBs = median(reads)
  const results = runners.map(({ label, ready, runs }) => {
    const secondsPerToken = median(runs.map(median)) / 1000
    const { weightBytes, bytesPerToken, residentBytes, device } = ready
    const readShare = bytesPerToken && bytesPerToken / secondsPerToken / 1e9 / readGBs
    const measured = { tokensPerSecond: 1 / secondsPerToken, readShare, weightBytes, bytesPerToken, residentBytes }
    return { label, device, ...measured, milliseconds: runs.map(median) }
  })
  return { readGBs, readsGBs: reads, results }
}

function print({ readGBs, results }: Awaited<ReturnType<typeof compare>>): void {
  console.log(`${options.config}, batch 1, ${tokens} tokens; read bandwidth ${readGBs.toFixed(1)} GB/s (all threads)`)
  const mib = (bytes?: number) => (bytes === undefined ? '' : (bytes / 2 ** 20).toFixed(0))
  const heads = ['who', 'tokens/s', 'MiB/token', 'of read bandwidth', 'weights MiB', 'resident MiB']
  const rows = results.map(r => [
    r.label,
    r.tokensPerSecond.toFixed(1),
    mib(r.bytesPerToken),
    r.readShare === undefined ? '' : `${(100 * r.readShare).toFixed(0)}%`,
    mib(r.weightBytes),
    mib(r.residentBytes),
  ])
  const widths = heads.map((head, i) => Math.max(head.length, ...rows.map(row => row[i].length)))
  for (const row of [heads, ...rows]) {
    console.log(row.map((cell, i) => (i < 1 ? cell.padEnd(widths[i]) : cell.padStart(widths[i]))).join('  '))
  }
}

if (options.worker !== undefined) await work(options.worker)
else {
  const found = await compare()
  print(found)
  if (options.json !== undefined) {
    const machine = {
      cpu: cpus()[0]?.model ?? 'unknown',
      cores: cpus().length,
      memoryBytes: totalmem(),
      load: loadavg()[0],
      node: process.version,
    }
    writeFileSync(options.json, `${JSON.stringify({ machine, config: options.config, tokens, ...found }, null, 2)}\n`)
  }
  process.exit(0)
}
