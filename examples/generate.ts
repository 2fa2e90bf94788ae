/** @file Continues a text with a trained model: the result of `npm start`, or any checkpoint in the Hugging Face layout. `npm run generate` runs this file. */
import { join } from 'node:path'
import { text as readAll } from 'node:stream/consumers'
import { parseArgs } from 'node:util'
import { firstAvailable, isMoeError, precisions, setDefaultBackend, type WeightFormat, weightBytes } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { modelFolder } from '@moe/trainer'

const help = `Continues a text with a trained model. The text goes to standard output, everything else to standard error.

  npm run generate -- FOLDER [PROMPT] [options]

  FOLDER             a model (config.json, *.safetensors, tokenizer.json), or a training run, whose latest checkpoint is used
  PROMPT             text to continue (default: standard input)

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

class UsageError extends Error {}

/** @throws UsageError, or the error of parseArgs, for an unknown option or an invalid value */
function readArguments() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      'max-tokens': { type: 'string', default: '160' },
      temperature: { type: 'string', default: '0.6' },
      'top-p': { type: 'string', default: '0.95' },
      'min-p': { type: 'string', default: '0' },
      'top-k': { type: 'string' },
      'repetition-penalty': { type: 'string', default: '1' },
      seed: { type: 'string', default: '0' },
      stop: { type: 'string', multiple: true },
      weights: { type: 'string' },
      precision: { type: 'string' },
      speculative: { type: 'boolean', default: false },
      json: { type: 'boolean', default: false },
      quiet: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  })
  type Numeric = 'max-tokens' | 'temperature' | 'top-k' | 'top-p' | 'min-p' | 'repetition-penalty' | 'seed'
  const number = (name: Numeric) => {
    const value = Number(values[name])
    if (values[name] === '' || !Number.isFinite(value))
      throw new UsageError(`--${name} is "${values[name]}", expected a number`)
    return value
  }
  const oneOf = <T extends string>(name: 'weights' | 'precision', known: readonly T[]) => {
    const value = known.find(choice => choice === values[name])
    if (values[name] !== undefined && value === undefined)
      throw new UsageError(`--${name} is "${values[name]}", expected one of ${known.join(', ')}`)
    return value
  }
  const [folder, prompt, ...more] = positionals
  if (more.length > 0) throw new UsageError(`expected one PROMPT, got ${more.length + 1}; put it in quotes`)
  return {
    ...values,
    folder,
    prompt,
    weights: oneOf<WeightFormat>('weights', ['bf16', 'fp8', 'int8', 'int4']),
    sampling: {
      maxTokens: number('max-tokens'),
      temperature: number('temperature'),
      topK: values['top-k'] === undefined ? undefined : number('top-k'),
      topP: number('top-p'),
      minP: number('min-p'),
      repetitionPenalty: number('repetition-penalty'),
      seed: number('seed'),
      stop: values.stop,
      speculative: values.speculative,
      precision: oneOf('precision', precisions),
    },
  }
}

// The reader may close the pipe early, as `| head` does.
process.stdout.on('error', () => process.exit())

const say = (text: string) => process.stderr.write(`${text}\n`)

async function main(options: ReturnType<typeof readArguments>): Promise<void> {
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
  const generation = model.generate(ids, { ...options.sampling, tokenizer, signal: abort.signal })
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

const isUsage = (error: Error): boolean =>
  error instanceof UsageError || /^ERR_PARSE_ARGS/.test(`${(error as NodeJS.ErrnoException).code}`)

/** Errors whose message says what to do, so that no stack trace is needed. */
const isExpected = (error: unknown): error is Error =>
  error instanceof Error && (isMoeError(error) || error.name === 'TokenizerError' || isUsage(error))

try {
  const options = readArguments()
  if (options.help) process.stdout.write(help)
  else await main(options)
} catch (error) {
  if (!isExpected(error)) throw error
  // Drop Node's advice about arguments that begin with a dash.
  const message = error.message.replace(/^Unknown option '(.+?)'.*/s, 'unknown option $1')
  say(`${message}${isUsage(error) ? '\nSee npm run generate -- --help.' : ''}`)
  process.exitCode = isUsage(error) ? 2 : 1
}
