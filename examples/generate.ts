/** @file Continues a text with a trained model: the result of `npm start`, or any checkpoint in the Hugging Face layout. `npm run generate` runs this file. */
import { join } from 'node:path'
import { text as readAll } from 'node:stream/consumers'
import { firstAvailable, isMoeError, precisions, setDefaultBackend, weightBytes } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { modelFolder } from '@moe/trainer'
import { commandLine, flag, integer, list, number, oneOf, text, UsageError } from './command-line.ts'

const help = `Continues a text with a trained model. The text goes to standard output, everything else to standard error.

  npm run generate -- FOLDER [PROMPT] [options]

  FOLDER             a model (config.json, *.safetensors, tokenizer.json), or a training run, whose latest checkpoint is used
  PROMPT             text to continue, in quotes (default: standard input)

  --max-tokens N     maximum number of generated tokens (default 160)
  --temperature X    sampling temperature; 0 is greedy decoding (default 0.6)
  --top-k N          sample from the N most likely tokens (default: all)
  --top-p X          sample from the most likely tokens whose probabilities add up to X (default 0.95)
  --min-p X          exclude tokens less likely than X times the most likely one (default 0)
  --repetition-penalty X   values above 1 reduce repetition (default 1)
  --seed N           seed of the sampling (default 0)
  --stop TEXT        stop when this text appears; may be repeated
  --weights F        quantize the weights to bf16, fp8, int8 or int4: faster and smaller, but less accurate
  --precision P      precision of matrix products: f32, bf16 or fp8 (default: bf16 with --weights, else f32)
  --speculative      speculative decoding with the MTP modules: fewer passes, but not faster on a CPU
  --json             print prompt, text and statistics as JSON to standard output
  --quiet            print no statistics to standard error
  -h, --help         print this help
`

const options = commandLine({
  command: 'npm run generate --',
  help,
  positionals: { folder: text(), prompt: text() },
  options: {
    'max-tokens': integer(1, 160),
    temperature: number(0.6),
    'top-k': integer(1),
    'top-p': number(0.95),
    'min-p': number(0),
    'repetition-penalty': number(1),
    seed: number(0),
    stop: list(),
    weights: oneOf(['bf16', 'fp8', 'int8', 'int4']),
    precision: oneOf(precisions),
    speculative: flag(),
    json: flag(),
    quiet: flag(),
  },
})

const say = (text: string) => process.stderr.write(`${text}\n`)

async function main(): Promise<void> {
  if (options.folder === undefined) throw new UsageError('missing FOLDER')
  const path = modelFolder(options.folder)
  const backend = await firstAvailable([
    () => import('@moe/kernels-cuda'),
    () => import('@moe/kernels-cpu'),
    () => import('@moe/backend-tfjs'),
  ])
  setDefaultBackend(backend)
  const tokenizer = await BpeTokenizer.fromFile(join(path, 'tokenizer.json'))
  const model = await DeepSeek.fromPretrained(path, { weights: options.weights })
  const { quiet } = options
  if (!quiet) {
    const { elements, bytes } = weightBytes(model)
    const size = `${(elements / 1e6).toFixed(1)}M parameters, ${(bytes / 2 ** 20).toFixed(0)} MiB`
    say(`${path}: ${size} on ${backend.name} (${backend.device})`)
  }
  const prompt = options.prompt ?? (await readAll(process.stdin)).trimEnd()
  const ids = tokenizer.encode(prompt)

  const abort = new AbortController()
  process.once('SIGINT', () => abort.abort())
  const generation = model.generate(ids, {
    tokenizer,
    maxTokens: options['max-tokens'],
    temperature: options.temperature,
    topK: options['top-k'],
    topP: options['top-p'],
    minP: options['min-p'],
    repetitionPenalty: options['repetition-penalty'],
    seed: options.seed,
    stop: options.stop,
    speculative: options.speculative,
    precision: options.precision,
    signal: abort.signal,
  })
  const started = performance.now()
  const parts: string[] = []
  if (!options.json) process.stdout.write(prompt)
  try {
    for await (const part of generation) {
      parts.push(part)
      if (!options.json) process.stdout.write(part)
    }
  } catch (error) {
    if (!isMoeError(error, 'E_ABORTED')) throw error
    process.exitCode = 130
  }
  const seconds = (performance.now() - started) / 1000
  const { tokens, steps, drafted, accepted, tokensPerStep } = generation.stats
  const figures = {
    promptTokens: ids.length,
    tokens,
    seconds,
    tokensPerSecond: tokens / seconds,
    steps,
    drafted,
    accepted,
  }
  if (options.json) process.stdout.write(`${JSON.stringify({ prompt, text: parts.join(''), ...figures })}\n`)
  else process.stdout.write('\n')
  if (quiet) return
  const drafts = drafted.length > 0 && steps > 0 ? `, ${tokensPerStep.toFixed(2)} tokens per pass` : ''
  say(`${tokens} tokens after a prompt of ${ids.length}, ${figures.tokensPerSecond.toFixed(0)} tokens/s${drafts}`)
}

await main()
