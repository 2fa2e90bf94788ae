/**
 * Evaluation: items per second of `score`.
 *
 *     pnpm bench score [--config 12m] [--weights f32,bf16,int8] [--items N] [--rounds N] [--threads N] [--json FILE]
 *
 * Compares `score`, which processes shared prefixes once, with whole texts in full batches and with single texts, with
 * f32, bf16 and int8 weights. Uses random weights and tokens. There are three kinds of items: like HellaSwag (60
 * tokens, four endings of 20 to 30), like ARC (30 tokens, four choices of 2 to 6), and like MMLU with five examples
 * (500 tokens shared by all items, questions of 80, four letters). Batches have up to 4,096 tokens of about the same
 * length, and only the required hidden states reach the head. All variants take turns in each round. The table shows
 * medians over the rounds, and ratios are medians of two runs in the same round, in wall time and in CPU time, which
 * can be compared on a busy machine, with one thread. Before the measurements, the log-probabilities of the answers are
 * compared between all variants.
 */
import { cpus } from 'node:os'
import { parseArgs } from 'node:util'
import { fromHost, keep, Random, setDefaultBackend, softmax, type WeightFormat } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { median, printTable, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    config: { type: 'string', default: '12m' },
    weights: { type: 'string', default: 'f32,bf16,int8' },
    items: { type: 'string', default: '32' },
    rounds: { type: 'string', default: '5' },
    threads: { type: 'string', default: String(cpus().length) },
    json: { type: 'string' },
  },
})
const count = Number(options.items)
const backend = await createBackend({ threads: Number(options.threads) })
setDefaultBackend(backend)
const config = { ...presets[options.config as keyof typeof presets], max_position_embeddings: 1024 }

interface Texts {
  readonly ids: readonly number[][]
  readonly from: readonly number[]
}

const random = new Random(7)
const words = (length: number) => Array.from({ length }, () => random.integer(config.vocab_size))

function texts(shared: number, question: number, least: number, most: number): Texts {
  const examples = words(shared)
  const ids: number[][] = []
  const from: number[] = []
  for (let i = 0; i < count; i++) {
    const context = [...examples, ...words(question - 8 + random.integer(17))]
    for (let c = 0; c < 4; c++) {
      ids.push([...context, ...words(least + random.integer(most - least + 1))])
      from.push(context.length)
    }
  }
  return { ids, from }
}

const kinds = { HellaSwag: texts(0, 60, 20, 30), ARC: texts(0, 30, 2, 6), 'MMLU, 5 examples': texts(500, 80, 1, 1) }

type Arm = (model: DeepSeek, texts: Texts) => Promise<number[]>

const arms: Readonly<Record<string, Arm>> = {
  'shared once': async (model, { ids, from }) => {
    const scores = await model.score(ids, { from })
    return scores.map((scored, i) => scored.slice(from[i]).reduce((sum, one) => sum + (one?.logProb ?? 0), 0))
  },
  'full batches': async (model, { ids, from }) => {
    const order = Array.from(ids.keys()).sort((a, b) => ids[b].length - ids[a].length)
    const result = new Array<number>(ids.length).fill(0)
    for (let start = 0; start < order.length; ) {
      const time = ids[order[start]].length - 1
      const rows = order.slice(start, start + Math.max(1, Math.floor(4096 / time)))
      start += rows.length
      const wanted = rows.flatMap((row, b) =>
        ids[row].slice(from[row]).map((token, i) => ({ row, token, state: b * time + from[row] + i - 1 })),
      )
      const input = Int32Array.from(
        { length: rows.length * time },
        (_, i) => ids[rows[Math.floor(i / time)]][i % time] ?? 0,
      )
      const chosen = keep(
        model.infer(
          () => {
            const hidden = model.hidden(fromHost(input, [rows.length, time], 'i32', backend))
            const index = Int32Array.from(wanted, ({ state }) => state)
            const states = hidden.reshape([hidden.size / config.hidden_size, config.hidden_size])
            const logits = model.lm_head.forward(states.takeRows(fromHost(index, [index.length], 'i32', backend)))
            const at = Int32Array.from(wanted, ({ token }, i) => i * config.vocab_size + token)
            const shares = softmax(logits).reshape([logits.size, 1])
            return shares.takeRows(fromHost(at, [at.length], 'i32', backend)).log()
          },
          { precision: precisionOf(model) },
        ),
      )
      const scored = await chosen.values()
      chosen.dispose()
      for (const [i, { row }] of wanted.entries()) result[row] += scored[i]
    }
    return result
  },
  'one by one': async (model, { ids, from }) => {
    const result: number[] = []
    for (const [i, text] of ids.entries()) {
      const [scored] = await model.score([text], { from: [from[i]] })
      result.push(scored.slice(from[i]).reduce((sum, one) => sum + (one?.logProb ?? 0), 0))
    }
    return result
  },
}

const stored = new Map<DeepSeek, WeightFormat | undefined>()
const precisionOf = (model: DeepSeek) => (stored.get(model) === undefined ? 'f32' : 'bf16')

interface Run {
  readonly wall: number
  readonly processor: number
}

async function timed(run: () => Promise<unknown>): Promise<Run> {
  const before = process.cpuUsage()
  const started = performance.now()
  await run()
  const { user, system } = process.cpuUsage(before)
  return { wall: (performance.now() - started) / 1000, processor: (user + system) / 1e6 }
}

const results = []
for (const format of options.weights.split(',')) {
  const weights = format === 'f32' ? undefined : (format as WeightFormat)
  const model = new DeepSeek(config, { seed: 1, weights })
  stored.set(model, weights)
  for (const [kind, of] of Object.entries(kinds)) {
    const runs = new Map<string, Run[]>(Object.keys(arms).map(name => [name, []]))
    const reference = await arms['shared once'](model, of)
    for (const arm of Object.values(arms)) {
      const worst = Math.max(
        ...(await arm(model, of)).map((x, i) => Math.abs(x - reference[i]) / Math.abs(reference[i])),
      )
      if (worst > (weights ? 2e-2 : 1e-4)) throw new Error(`${kind}, ${format}: sums differ by ${worst}`)
    }
    for (let round = 0; round < Number(options.rounds); round++) {
      for (const [name, arm] of Object.entries(arms)) runs.get(name)?.push(await timed(() => arm(model, of)))
    }
    const shared = runs.get('shared once') as Run[]
    for (const [arm, own] of runs) {
      const itemsPerSecond = count / median(own.map(({ wall }) => wall))
      const ratio = (time: keyof Run) => median(own.map((run, i) => run[time] / shared[i][time]))
      results.push({ kind, weights: format, arm, itemsPerSecond, wall: ratio('wall'), processor: ratio('processor') })
    }
  }
  model.dispose()
}

printTable(
  ['items', 'weights', '', 'items/s', 'time vs shared once', 'processor time'],
  results.map(({ kind, weights, arm, itemsPerSecond, wall, processor }) => [
    ...[kind, weights, arm, itemsPerSecond.toFixed(1), `${wall.toFixed(2)} x`, `${processor.toFixed(2)} x`],
  ]),
)
writeResults(options.json, { config: options.config, items: count, results })
