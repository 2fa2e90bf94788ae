/**
 * Tokens per second of a training step, compared with PyTorch.
 *
 *     pnpm bench train [--config 12m,200m] [--precision f32,bf16] [--steps N] [--rounds N] [--json FILE] [--no-peers]
 *                [--compiled-peer] [--profile] [--experts N] [--no-record]
 *
 * Measures DeepSeek-V3 models of fixed sizes; PyTorch requires `.venv-reference`. A step is forward, backward, clipping
 * at norm 1 and AdamW on 2,048 random tokens (--tokens) in sequences of 256 (--seq). Every measurement is a separate
 * process. Ours and PyTorch's take turns, and medians are over all timed steps of all rounds. The step is recorded and
 * replayed, as in `train`, and --profile prints the time of each kernel; with --no-record it runs op by op, and
 * --profile prints the time of each op.
 */
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import {
  type Backend,
  fallbacks,
  firstAvailable,
  MoeError,
  namedParameters,
  type Precision,
  parameterCount,
  Random,
  setDefaultBackend,
} from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { AdamW, type TokenBatch, TrainingSteps } from '@moe/trainer'
import { findPython, lastJson, median, printTable, root, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    config: { type: 'string', default: '12m' },
    precision: { type: 'string', default: 'f32,bf16' },
    backend: { type: 'string', default: 'kernels-cpu' },
    steps: { type: 'string', default: '5' },
    warmup: { type: 'string', default: '2' },
    rounds: { type: 'string', default: '2' },
    seq: { type: 'string', default: '256' },
    tokens: { type: 'string', default: '2048' },
    experts: { type: 'string' },
    json: { type: 'string' },
    peers: { type: 'boolean', default: true },
    'compiled-peer': { type: 'boolean', default: false },
    profile: { type: 'boolean', default: false },
    record: { type: 'boolean', default: true },
    worker: { type: 'boolean', default: false },
  },
  allowNegative: true,
})
const tokensPerStep = Number(options.tokens)

/** The result of one process. */
interface Measurement {
  readonly config: string
  readonly backend: string
  readonly device: string
  readonly precision: string
  readonly sequenceLength: number
  readonly parameters: number
  readonly seconds: readonly number[]
  readonly peakMemoryBytes: number
  /** With --profile: milliseconds per step of each kernel or op, and of everything else. */
  readonly ops?: Readonly<Record<string, number>>
  readonly firstLoss: number
  readonly lastLoss: number
}

// --- worker process: measures ---

async function pickBackend(): Promise<Backend> {
  const loaders = {
    'kernels-cuda': () => import('@moe/kernels-cuda'),
    'kernels-cpu': () => import('@moe/kernels-cpu'),
    'kernels-webgpu': () => import('@moe/kernels-webgpu'),
    'backend-tfjs': () => import('@moe/backend-tfjs'),
  }
  const first = loaders[options.backend as keyof typeof loaders]
  if (first === undefined) throw new Error(`--backend: expected one of ${Object.keys(loaders).join(', ')}`)
  return firstAvailable([first, loaders['backend-tfjs']], { onSkip: reason => console.error(`skipped: ${reason}`) })
}

function presetOf(name: string): (typeof presets)[keyof typeof presets] {
  if (!Object.hasOwn(presets, name)) throw new Error(`--config: expected one of ${Object.keys(presets).join(', ')}`)
  return presets[name as keyof typeof presets]
}

async function work(): Promise<Measurement> {
  const backend = await pickBackend()
  setDefaultBackend(backend)
  const { config, precision } = options
  const preset = presetOf(config)
  const sequenceLength = Number(options.seq)
  const experts = options.experts === undefined ? {} : { n_routed_experts: Number(options.experts) }
  const model = new DeepSeek({ ...preset, ...experts, max_position_embeddings: Math.max(512, sequenceLength) })
  const parameters = namedParameters(model)
  const optimizer = new AdamW(parameters)
  const batch = randomBatch(tokensPerStep / sequenceLength, sequenceLength + model.lookahead, model.vocabSize)
  const settings = { clip: 1, precision: precision as Precision, record: options.record }
  const steps = new TrainingSteps(model, parameters, optimizer, settings)
  const step = async () => {
    const { loss } = await steps.step([batch], { lr: 1e-3 })
    await backend.sync()
    return loss
  }
  const firstLoss = await step()
  for (let i = 1; i < Number(options.warmup); i++) await step()
  const stopProfile = options.profile ? await startProfile() : undefined
  const seconds: number[] = []
  let lastLoss = firstLoss
  for (let i = 0; i < Number(options.steps); i++) {
    const started = performance.now()
    lastLoss = await step()
    seconds.push((performance.now() - started) / 1000)
  }
  const ops = stopProfile?.(seconds)
  const slow = fallbacks().filter(({ backend: name }) => name === backend.name)
  if (slow.length > 0) console.error(`ops without their own kernel: ${slow.map(({ op }) => op).join(', ')}`)
  return {
    config,
    backend: backend.name,
    device: backend.device,
    precision: precision === 'bf16' && !backend.bf16Matmul ? 'f32' : precision,
    sequenceLength,
    parameters: parameterCount(model),
    seconds,
    peakMemoryBytes: process.resourceUsage().maxRSS * 1024,
    ops,
    firstLoss,
    lastLoss,
  }
}

function randomBatch(rows: number, length: number, vocabulary: number): TokenBatch {
  const random = new Random(0)
  const tokens = Int32Array.from({ length: rows * length }, () => random.integer(vocabulary))
  return { tokens, documents: new Int32Array(rows * length), rows, length }
}

/** Starts timing every kernel or op of kernels-cpu. The returned function prints the times and returns them by name. */
async function startProfile(): Promise<(seconds: readonly number[]) => Record<string, number>> {
  const { profile, startProfile, stopProfile } = await import('@moe/kernels-cpu')
  startProfile()
  return seconds => {
    stopProfile()
    const total = 1000 * seconds.reduce((sum, time) => sum + time, 0)
    const ops = profile()
    const steps = seconds.length
    const inOps = ops.reduce((sum, { milliseconds }) => sum + milliseconds, 0)
    const line = (op: string, calls: string, milliseconds: number) =>
      console.error(
        `${op.padEnd(28)} ${calls.padStart(8)} ${(milliseconds / steps).toFixed(2).padStart(9)} ${((100 * milliseconds) / total).toFixed(1).padStart(6)}%`,
      )
    console.error(`${'op'.padEnd(28)} ${'calls'.padStart(8)} ${'ms/step'.padStart(9)} ${'share'.padStart(7)}`)
    for (const { op, calls, milliseconds } of ops) line(op, String(Math.round(calls / steps)), milliseconds)
    line('engine, host and waiting', '', total - inOps)
    line('step', '', total)
    const perStep = ops.map(({ op, milliseconds }) => [op, milliseconds / steps])
    return { ...Object.fromEntries(perStep), engine: (total - inOps) / steps }
  }
}

// --- main process: starts workers and compares ---

/** A program that runs the step. It prints progress to standard error and a JSON object as its last line of output. */
interface Runner {
  readonly label: string
  readonly command: string
  readonly args: readonly string[]
  read(output: Record<string, unknown>): Measurement
}

function ours(config: string, precision: string): Runner {
  const settings = {
    config,
    precision,
    backend: options.backend,
    steps: options.steps,
    warmup: options.warmup,
    seq: options.seq,
    tokens: options.tokens,
  }
  const args = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, value])
  if (options.profile) args.push('--profile')
  if (!options.record) args.push('--no-record')
  return {
    label: `@moe ${precision}`,
    command: process.execPath,
    args: [fileURLToPath(import.meta.url), '--worker', ...args],
    read: output => output as unknown as Measurement,
  }
}

function torch(python: string, config: string, precision: string, compiled: boolean): Runner {
  const { steps, warmup, seq, tokens } = options
  const sizes = ['--steps', steps, '--warmup', warmup, '--seq', seq, '--tokens', tokens]
  const args = ['--config', config, '--mode', precision, ...sizes, '--json']
  return {
    label: `PyTorch ${precision} ${compiled ? 'compiled' : 'eager'}`,
    command: python,
    args: [`${root}bench/peers/train_torch.py`, ...args, ...(compiled ? ['--compile'] : [])],
    read: output => {
      const { torch: version } = output['versions'] as { torch: string }
      const backend = `pytorch ${version}${compiled ? ' compiled' : ''}`
      return { ...(output as unknown as Measurement), backend, device: 'cpu', precision, sequenceLength: Number(seq) }
    },
  }
}

/** Combines a runner's rounds into one result. */
function summarize(label: string, rounds: readonly Measurement[]) {
  const seconds = rounds.flatMap(round => round.seconds)
  const { config, backend, device, precision, sequenceLength, parameters, firstLoss, lastLoss } = rounds[0]
  const secondsPerStep = median(seconds)
  const peakMemoryBytes = Math.max(...rounds.map(round => round.peakMemoryBytes))
  const tokensPerSecond = tokensPerStep / secondsPerStep
  const measured = { tokensPerSecond, peakMemoryBytes, secondsPerStep, seconds }
  return { config, backend, precision, ...measured, label, device, sequenceLength, parameters, firstLoss, lastLoss }
}

function compare(config: string) {
  const precisions = options.precision.split(',')
  const runners = precisions.map(precision => ours(config, precision))
  const python = findPython(options.peers)
  if (python) {
    for (const precision of precisions) {
      runners.push(torch(python, config, precision, false))
      if (options['compiled-peer']) runners.push(torch(python, config, precision, true))
    }
  }
  const rounds = new Map<Runner, Measurement[]>(runners.map(runner => [runner, []]))
  for (let round = 0; round < Number(options.rounds); round++) {
    for (const [runner, measured] of rounds) {
      measured.push(runner.read(lastJson(runner.label, runner.command, runner.args)))
      console.error(
        `${config} ${runner.label}: ${(tokensPerStep / median(measured[round].seconds)).toFixed(0)} tokens/s`,
      )
    }
  }
  return [...rounds].map(([runner, measured]) => summarize(runner.label, measured))
}

type Result = ReturnType<typeof compare>[number]

function print(results: readonly Result[]): void {
  const best = (config: string) =>
    Math.max(...results.filter(r => r.config === config && r.backend.startsWith('pytorch')).map(r => r.tokensPerSecond))
  const heads = ['config', 'who', 'tokens/s', 's/step', 'peak MiB', 'vs best PyTorch', 'loss']
  const rows = results.map(r => {
    const ratio = r.tokensPerSecond / best(r.config)
    return [
      r.config,
      r.label,
      r.tokensPerSecond.toFixed(0),
      r.secondsPerStep.toFixed(3),
      (r.peakMemoryBytes / 2 ** 20).toFixed(0),
      Number.isFinite(ratio) && ratio > 0 ? `${ratio.toFixed(2)}x` : '',
      `${r.firstLoss.toFixed(3)} -> ${r.lastLoss.toFixed(3)}`,
    ]
  })
  printTable(heads, rows, 2)
}

if (options.worker) {
  const measured = await work()
  process.stdout.write(`${JSON.stringify(measured)}\n`)
} else {
  const configs = options.config.split(',')
  for (const config of configs) presetOf(config)
  if (tokensPerStep % Number(options.seq) !== 0) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'bench train',
      problem: `--seq ${options.seq} does not divide --tokens ${tokensPerStep}`,
    })
  }
  const results = configs.flatMap(compare)
  print(results)
  writeResults(options.json, { tokensPerStep, results })
}
