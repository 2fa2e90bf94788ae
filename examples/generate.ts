/** @file Lets a trained model continue a text: what `npm start` left behind, or any checkpoint in the layout of Hugging Face. This is what `npm run generate` runs. */
import { join } from 'node:path'
import { text as readAll } from 'node:stream/consumers'
import { parseArgs } from 'node:util'
import { firstAvailable, isMoeError, precisions, setDefaultBackend, type WeightFormat, weightBytes } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { modelFolder } from '@moe/trainer'

const help = `Continues a text. The text goes to standard output, everything else to standard error.

  npm run generate -- FOLDER [PROMPT] [options]

  FOLDER             a model (config.json, *.safetensors, tokenizer.json), or a run, whose latest checkpoint it takes
  PROMPT             what is continued; default: standard input

  --max-tokens N     default 160
  --temperature X    0 takes the likeliest token (default 0.6)
  --top-k N          only so many tokens, the likeliest (default: all)
  --top-p X          smallest set of these whose share of their probability reaches this (default 0.95)
  --min-p X          only tokens at least this share of the likeliest one's probability (default 0)
  --repetition-penalty X   above 1 the text repeats itself less (default 1)
  --seed N           other choices (default 0)
  --stop TEXT        where the text ends; may be repeated
  --weights F        store weights as bf16, fp8, int8 or int4: faster, smaller, less exact
  --precision P      f32, bf16 or fp8 arithmetic in matrix products (default: bf16 with --weights, else f32)
  --speculative      MTP modules draft: fewer passes, which is no faster on a CPU
  --json             print prompt, text and figures as JSON on standard output
  --quiet            no figures on standard error
  --help
`

class UsageError extends Error {}

/** @throws UsageError, or parseArgs' own error, that names an unknown option or a value that cannot be */
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
      help: { type: 'boolean', default: false },
    },
  })
  type Numeric = 'max-tokens' | 'temperature' | 'top-k' | 'top-p' | 'min-p' | 'repetition-penalty' | 'seed'
  const number = (name: Numeric) => {
    const value = Number(values[name])
    if (values[name] === '' || !Number.isFinite(value))
      throw new UsageError(`--${name} is "${values[name]}", needs a number`)
    return value
  }
  const oneOf = <T extends string>(name: 'weights' | 'precision', known: readonly T[]) => {
    const value = known.find(choice => choice === values[name])
    if (values[name] !== undefined && value === undefined)
      throw new UsageError(`--${name} is "${values[name]}", needs one of ${known.join(', ')}`)
    return value
  }
  const [folder, prompt, ...more] = positionals
  if (more.length > 0) throw new UsageError('put the prompt in quotes: it is one argument')
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

// Whoever reads the text may have had enough of it, as in `| head`.
process.stdout.on('error', () => process.exit())

const say = (text: string) => process.stderr.write(`${text}\n`)

async function main(options: ReturnType<typeof readArguments>): Promise<void> {
  if (options.folder === undefined) throw new UsageError('which model? See --help.')
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
  const drafts = drafted.length > 0 && steps > 0 ? `, ${tokensPerStep.toFixed(2)} tokens a pass with drafts` : ''
  say(`${tokens} tokens after a prompt of ${ids.length}, ${figures.tokensPerSecond.toFixed(0)} tokens/s${drafts}`)
}

/** Failures that say by themselves what to do; a stack would only hide it. */
const isExpected = (error: unknown): error is Error =>
  error instanceof Error &&
  (isMoeError(error) ||
    error instanceof UsageError ||
    error.name === 'TokenizerError' ||
    /^ERR_PARSE_ARGS/.test(`${(error as NodeJS.ErrnoException).code}`))

try {
  const options = readArguments()
  if (options.help) process.stdout.write(help)
  else await main(options)
} catch (error) {
  if (!isExpected(error)) throw error
  say(error.message)
  process.exitCode = 1
}
