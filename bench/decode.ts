/**
 * Decoding at batch size 1, compared with llama.cpp and transformers.
 *
 *     pnpm bench decode [--config 200m] [--weights f32,bf16,int8,int4] [--tokens N] [--rounds N] [--threads N]
 *                       [--json FILE] [--no-peers] [--profile]
 *
 * Measures tokens per second with f32, bf16, int8 and int4 weights, and the share of the machine's read bandwidth.
 * llama.cpp runs at the same number of bits (f32, bf16, q8_0, q4_0) if you have run
 * `npm install --prefix bench/peers/llama-cpp`, and transformers' generate if `.venv-reference` exists. Every variant
 * is a process with the model in memory. They take turns, with one run of N tokens each per round. The time per token
 * of a run is the median over its tokens, and the table shows the median over the rounds. Read bandwidth is measured
 * between the rounds with the faster of two ops that read 256 MiB with all threads (maximum, root of the sum of
 * squares). The last columns are the memory of the weights and of the process. Ratios are medians over the rounds of
 * two runs in the same round, in wall time and in CPU time, which can be compared on a busy machine, with one thread.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { fallbacks, globalNorm, noGrad, ones, setDefaultBackend, type WeightFormat, weightBytes } from '@moe/core'
import { DeepSeek, exportGguf, presets } from '@moe/deepseek'
import { createBackend, profile, startProfile, stopProfile } from '@moe/kernels-cpu'
import { trainBpe } from '@moe/tokenizer-bpe'
import { bytesPerToken } from './shared/bytes-per-token.ts'
import { findPython, median, printTable, root, writeResults } from './shared/report.ts'

const llamaCpp = `${root}bench/peers/llama-cpp`
/** llama.cpp's formats of the same precision. */
const sameBits = { f32: 'f32', bf16: 'bf16', int8: 'q8_0', int4: 'q4_0' } as const

const { values: options } = parseArgs({
  options: {
    config: { type: 'string', default: '200m' },
    weights: { type: 'string', default: 'f32,bf16,int8,int4' },
    tokens: { type: 'string', default: '32' },
    rounds: { type: 'string', default: '5' },
    threads: { type: 'string', default: String(cpus().length) },
    json: { type: 'string' },
    peers: { type: 'boolean', default: true },
    profile: { type: 'boolean', default: false },
    worker: { type: 'string' },
  },
  allowNegative: true,
})
const tokens = Number(options.tokens)
const sameForAll = ['--tokens', options.tokens, '--threads', options.threads]
const prompt = Array.from({ length: 16 }, (_, i) => 7 + 3 * i)

/** A worker's report of a run: milliseconds of each token after the first, and the average processor time per token. */
interface Run {
  readonly milliseconds: number[]
  readonly processor: number
}

/** A worker's report when its model is ready. */
interface Ready {
  readonly device: string
  /** Bytes of all weights, and of the weights that one token reads. */
  readonly weightBytes: number
  readonly bytesPerToken: number
  readonly residentBytes: number
}

// --- worker processes: for each line of input, one line of JSON ---

async function work(weights: string): Promise<void> {
  const backend = await createBackend({ threads: Number(options.threads) })
  setDefaultBackend(backend)
  const preset = presets[options.config as keyof typeof presets]
  const model = new DeepSeek(preset, { weights: weights === 'f32' ? undefined : (weights as WeightFormat) })
  backend.trim()
  const reply = (value: object) => process.stdout.write(`${JSON.stringify(value)}\n`)
  /** The first token includes the prompt. */
  const run = async (): Promise<Run> => {
    const times: number[] = []
    let usage = process.cpuUsage()
    let before = performance.now()
    for await (const _ of model.generate(prompt, { maxTokens: tokens + 1 })) {
      const now = performance.now()
      times.push(now - before)
      if (times.length === 1) usage = process.cpuUsage()
      before = now
    }
    const { user, system } = process.cpuUsage(usage)
    return { milliseconds: times.slice(1), processor: (user + system) / 1000 / (times.length - 1) }
  }
  // Lets V8 optimize the engine's code, which takes a while on a busy machine.
  for (let i = 0; i < 4; i++) await run()
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
  if (slow.length > 0) console.error(`ops without their own kernel: ${slow.map(({ op }) => op).join(', ')}`)
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

// --- main process: starts workers and compares ---

class Runner {
  readonly label: string
  /** Our format of the same precision, for ratios. */
  readonly weights: string
  readonly runs: Run[] = []
  ready: Partial<Ready> = {}
  readonly #child: ChildProcess
  readonly #lines: AsyncIterator<string>

  constructor(label: string, weights: string, command: string, args: readonly string[]) {
    this.label = label
    this.weights = weights
    this.#child = spawn(command, args, { cwd: root, stdio: ['pipe', 'pipe', 'inherit'] })
    this.#lines = createInterface({ input: this.#child.stdout as NodeJS.ReadableStream })[Symbol.asyncIterator]()
  }

  async #next<T>(): Promise<T> {
    const { value, done } = await this.#lines.next()
    if (done) throw new Error(`${this.label} exited early`)
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

/** GB/s of one pass over 256 MiB, by the faster of two ops. */
async function readBandwidth(): Promise<() => number> {
  const backend = await createBackend({ threads: Number(options.threads) })
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

/** Worker processes, one for each of our formats. */
function ownRunners(formats: readonly string[]): Runner[] {
  return formats.map(weights => {
    const flags = ['--worker', weights, '--config', options.config, ...sameForAll]
    if (options.profile) flags.push('--profile')
    return new Runner(`@moe ${weights}`, weights, process.execPath, [fileURLToPath(import.meta.url), ...flags])
  })
}

/** llama.cpp with the same weights as our workers, which all use the same seed. Its files are written to `folder`. */
async function llamaCppRunners(formats: readonly string[], folder: string): Promise<Runner[]> {
  if (!existsSync(`${llamaCpp}/node_modules/node-llama-cpp`)) {
    console.error('skipping llama.cpp; to include it, run npm install --prefix bench/peers/llama-cpp')
    return []
  }
  const backend = await createBackend()
  const model = new DeepSeek(presets[options.config as keyof typeof presets], { backend })
  // With random weights, any vocabulary will do.
  const tokenizer = trainBpe(['any text'], { vocabSize: 260, minFrequency: 1 })
  const runners: Runner[] = []
  for (const weights of formats) {
    const type = sameBits[weights as keyof typeof sameBits]
    if (type === undefined) continue
    const file = join(folder, `${options.config}.${type}.gguf`)
    await exportGguf(model, file, { type, tokenizer })
    const flags = [`${llamaCpp}/decode.mjs`, '--file', file, ...sameForAll]
    runners.push(new Runner(`llama.cpp ${type}`, weights, process.execPath, flags))
  }
  model.dispose()
  backend.trim()
  return runners
}

function transformersRunners(): Runner[] {
  const python = findPython(true)
  if (python === undefined) return []
  return ['f32', 'bf16'].map(dtype => {
    const flags = ['--config', options.config, '--dtype', dtype, ...sameForAll]
    const script = `${root}bench/peers/decode_transformers.py`
    return new Runner(`transformers ${dtype}`, dtype, python, [script, ...flags])
  })
}

async function compare(folder: string) {
  const formats = options.weights.split(',')
  const peers = options.peers ? [...(await llamaCppRunners(formats, folder)), ...transformersRunners()] : []
  const runners = [...ownRunners(formats), ...peers]
  for (const runner of runners) await runner.start()
  const bandwidth = await readBandwidth()
  const reads: number[] = [bandwidth()]
  for (let round = 0; round < Number(options.rounds); round++) {
    for (const runner of runners) await runner.run()
    reads.push(...[1, 2, 3].map(bandwidth))
  }
  for (const runner of runners) runner.stop()
  const readGBs = median(reads)
  const results = runners.map(({ label, weights, ready, runs }) => {
    const milliseconds = runs.map(run => median(run.milliseconds))
    const processorMilliseconds = runs.map(({ processor }) => processor)
    const secondsPerToken = median(milliseconds) / 1000
    const { weightBytes, bytesPerToken, residentBytes, device } = ready
    const readShare = bytesPerToken && bytesPerToken / secondsPerToken / 1e9 / readGBs
    const measured = { tokensPerSecond: 1 / secondsPerToken, readShare, weightBytes, bytesPerToken, residentBytes }
    return { label, weights, device, ...measured, milliseconds, processorMilliseconds }
  })
  return { readGBs, readsGBs: reads, results, ratios: ratiosOf(results) }
}

interface Result {
  readonly label: string
  readonly weights: string
  /** Per token, by round. */
  readonly milliseconds: readonly number[]
  readonly processorMilliseconds: readonly number[]
}

/** Speed relative to each peer of the same precision: the median over the rounds. */
function ratiosOf(results: readonly Result[]) {
  const own = results.filter(({ label }) => label.startsWith('@moe'))
  const peers = results.filter(({ label }) => !label.startsWith('@moe'))
  return peers.flatMap(peer =>
    own
      .filter(({ weights }) => weights === peer.weights)
      .map(mine => {
        const ratio = (of: 'milliseconds' | 'processorMilliseconds') =>
          median(peer[of].map((theirs, round) => theirs / mine[of][round]))
        const processorRatio = ratio('processorMilliseconds')
        return { who: mine.label, than: peer.label, ratio: ratio('milliseconds'), processorRatio }
      }),
  )
}

function print({ readGBs, results, ratios }: Awaited<ReturnType<typeof compare>>): void {
  const threads = options.threads === '1' ? '1 thread' : `${options.threads} threads`
  console.log(`${options.config}, batch 1, ${tokens} tokens, ${threads}; read bandwidth ${readGBs.toFixed(1)} GB/s`)
  const mib = (bytes?: number) => (bytes === undefined ? '' : (bytes / 2 ** 20).toFixed(0))
  const heads = ['who', 'tokens/s', 'processor ms', 'MiB/token', 'of read bandwidth', 'weights MiB', 'resident MiB']
  const rows = results.map(r => [
    r.label,
    r.tokensPerSecond.toFixed(1),
    median(r.processorMilliseconds).toFixed(1),
    mib(r.bytesPerToken),
    r.readShare === undefined ? '' : `${(100 * r.readShare).toFixed(0)}%`,
    mib(r.weightBytes),
    mib(r.residentBytes),
  ])
  printTable(heads, rows)
  for (const { who, than, ratio, processorRatio } of ratios) {
    console.log(`${who}: ${ratio.toFixed(2)}x the speed of ${than}, ${processorRatio.toFixed(2)}x in processor time`)
  }
}

if (options.worker !== undefined) await work(options.worker)
else {
  const folder = mkdtempSync(join(tmpdir(), 'moe-decode-'))
  const found = await compare(folder).finally(() => rmSync(folder, { recursive: true }))
  print(found)
  writeResults(options.json, { config: options.config, tokens, threads: Number(options.threads), ...found })
  process.exit(0)
}
