/**
 * Many texts at once: tokens per second of `continuousBatch` with 1, 2, 4 ... texts, beside `generate` for one text after the other, weights in f32, bf16 and int8.
 *
 *     pnpm bench batch [--config 200m] [--weights f32,bf16,int8] [--texts 1,2,4,8,16] [--tokens N] [--rounds N] [--threads N] [--json FILE]
 *
 * Every text has a prompt of its own of 16 tokens and makes N more. All arms take turns in each round; the table shows medians over the rounds, and ratios are medians
 * of two runs in the same round. Prompts count as time and not as tokens.
 */
import { cpus } from 'node:os'
import { parseArgs } from 'node:util'
import { Random, setDefaultBackend, type WeightFormat } from '@moe/core'
import { DeepSeek, type Generation, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { median, printTable, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    config: { type: 'string', default: '200m' },
    weights: { type: 'string', default: 'f32,bf16,int8' },
    texts: { type: 'string', default: '1,2,4,8,16' },
    tokens: { type: 'string', default: '32' },
    rounds: { type: 'string', default: '5' },
    threads: { type: 'string', default: String(cpus().length) },
    json: { type: 'string' },
  },
})
const maxTokens = Number(options.tokens)
const counts = options.texts.split(',').map(Number)
const backend = await createBackend({ threads: Number(options.threads) })
setDefaultBackend(backend)

/** A prompt that no other text had, so that nothing is shared. */
const random = new Random(1)
const prompt = (vocabulary: number) => Array.from(random.uniform(16), x => Math.floor(x * vocabulary))

async function read(text: Generation<number>): Promise<number> {
  let tokens = 0
  for await (const _ of text) tokens++
  return tokens
}

async function perSecond(make: () => Promise<number>): Promise<number> {
  const start = performance.now()
  const tokens = await make()
  return (1000 * tokens) / (performance.now() - start)
}

const results: { weights: string; texts: number | null; tokensPerSecond: number; ofGenerate: number }[] = []
for (const weights of options.weights.split(',')) {
  const config = { ...presets[options.config as keyof typeof presets], eos_token_id: null }
  const model = new DeepSeek(config, { weights: weights === 'f32' ? undefined : (weights as WeightFormat) })
  const batch = model.continuousBatch({ maxTexts: Math.max(...counts) })
  const { vocab_size: vocabulary } = model.config
  const arms = [
    () => read(model.generate(prompt(vocabulary), { maxTokens, speculative: false })),
    ...counts.map(count => async () => {
      const texts = Array.from({ length: count }, () => read(batch.generate(prompt(vocabulary), { maxTokens })))
      return (await Promise.all(texts)).reduce((sum, tokens) => sum + tokens, 0)
    }),
  ]
  for (const arm of arms) await arm()
  const rates: number[][] = arms.map(() => [])
  for (let round = 0; round < Number(options.rounds); round++) {
    for (const [i, arm] of arms.entries()) rates[i].push(await perSecond(arm))
  }
  for (const [i, values] of rates.entries()) {
    results.push({
      weights,
      texts: i === 0 ? null : counts[i - 1],
      tokensPerSecond: median(values),
      ofGenerate: median(values.map((value, round) => value / rates[0][round])),
    })
  }
  batch.dispose()
  model.dispose()
}
printTable(
  ['weights', 'texts', 'tokens/s', 'of generate'],
  results.map(({ weights, texts, tokensPerSecond, ofGenerate }) => [
    weights,
    texts === null ? 'generate' : `${texts}`,
    tokensPerSecond.toFixed(0),
    ofGenerate.toFixed(2),
  ]),
  2,
)
writeResults(options.json, { config: options.config, tokens: maxTokens, device: backend.device, results })
