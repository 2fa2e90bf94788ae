/** @file Built-in tasks, as lm-evaluation-harness defines them, for the published JSON lines. */
import { fieldOf } from './fields.ts'
import type { ChoiceTask, ContinuationTask, GenerationTask, Item, TextTask } from './task.ts'

const arc = (name: string): ChoiceTask => ({
  name,
  kind: 'choice',
  context: item => `Question: ${arcQuestion(item).stem}\nAnswer:`,
  choices: item => arcQuestion(item).texts,
  labels: item => arcQuestion(item).labels,
  answer: 'answerKey',
})

/** As AI2 publishes it (`question: { stem, choices: [{ text, label }] }`), and as it is on the Hugging Face hub (`question`, `choices: { text, label }`). */
function arcQuestion(item: Item): { stem: string; texts: string[]; labels: string[] } {
  const question = item.question as { stem?: string; choices?: unknown } | string | undefined
  const nested = typeof question === 'object' && question !== null
  const choices = (nested ? question.choices : item.choices) as Item | readonly Item[] | undefined
  const column = (name: string) =>
    Array.isArray(choices) ? choices.map(choice => choice?.[name]) : (choices as Item | undefined)?.[name]
  const stem = nested ? fieldOf(question as Item, 'stem') : fieldOf(item, 'question')
  return { stem, texts: listOf(column('text'), 'choices.text'), labels: listOf(column('label'), 'choices.label') }
}

function listOf(value: unknown, name: string): string[] {
  if (Array.isArray(value) && value.length > 0 && value.every(one => typeof one === 'string')) return value
  throw new Error(`the list ${name} is missing`)
}

/** Removes the bracketed markup of WikiHow from HellaSwag's texts. */
const withoutMarks = (text: string): string =>
  text
    .trim()
    .replaceAll(' [title]', '. ')
    .replace(/\[.*?\]/g, '')
    .replaceAll('  ', ' ')

const capitalized = (text: string): string => {
  const [first = '', ...rest] = text
  return first.toUpperCase() + rest.join('').toLowerCase()
}

const hellaswag: ChoiceTask = {
  name: 'hellaswag',
  kind: 'choice',
  context: item => {
    const context = `${fieldOf(item, 'ctx_a')} ${capitalized(fieldOf(item, 'ctx_b'))}`
    return withoutMarks(`${fieldOf(item, 'activity_label')}: ${context}`)
  },
  choices: item => listOf(item.endings, 'endings').map(withoutMarks),
  answer: 'label',
}

const piqa: ChoiceTask = {
  name: 'piqa',
  kind: 'choice',
  context: 'Question: {{goal}}\nAnswer:',
  choices: '{{ [sol1, sol2] }}',
  answer: 'label',
}

/** Partial evaluation: each option is inserted into the context, and the text after the blank is scored (Trinh and Le 2018). */
const winogrande: ChoiceTask = {
  name: 'winogrande',
  kind: 'choice',
  context: item => {
    const [before] = aroundBlank(item)
    return [before + fieldOf(item, 'option1'), before + fieldOf(item, 'option2')]
  },
  choices: item => aroundBlank(item)[1].trim(),
  labels: ['1', '2'],
  answer: 'answer',
}

function aroundBlank(item: Item): [before: string, after: string] {
  const sentence = fieldOf(item, 'sentence')
  const at = sentence.indexOf('_')
  if (at < 0) throw new Error('sentence has no blank, written as _')
  return [sentence.slice(0, at), sentence.slice(at + 1)]
}

const letters = ['A', 'B', 'C', 'D']

const mmlu: ChoiceTask = {
  name: 'mmlu',
  kind: 'choice',
  description: item =>
    `The following are multiple choice questions (with answers) about ${fieldOf(item, 'subject').replaceAll('_', ' ')}.\n\n`,
  context: item => {
    const choices = listOf(item.choices, 'choices')
    if (choices.length !== 4) throw new Error(`expected 4 choices, got ${choices.length}`)
    const lines = choices.map((choice, i) => `${letters[i]}. ${choice}`)
    return [fieldOf(item, 'question').trim(), ...lines, 'Answer:'].join('\n')
  },
  choices: letters,
  labels: letters,
  answer: 'answer',
  group: 'subject',
  draw: 'first',
}

const lambada: ContinuationTask = {
  name: 'lambada',
  kind: 'continuation',
  context: item => fieldOf(item, 'text').split(' ').slice(0, -1).join(' '),
  answer: item => fieldOf(item, 'text').split(' ').at(-1) as string,
}

const gsm8k: GenerationTask = {
  name: 'gsm8k',
  kind: 'generation',
  context: 'Question: {{question}}\nAnswer:',
  answer: 'answer',
  shots: 5,
  stop: ['Question:', '</s>', '<|im_end|>'],
  matches: Object.fromEntries(
    Object.entries({
      'strict-match': { extract: '#### (-?[0-9.,]+)' },
      'flexible-extract': { extract: '(-?[$0-9.,]{2,})|(-?[0-9]+)', pick: 'last' as const },
    }).map(([name, match]) => [
      `exact_match,${name}`,
      { ...match, ignore: [',', '\\$', '[\\s\\S]*#### ', '\\.$'], ignoreCase: true },
    ]),
  ),
}

const text: TextTask = { name: 'text', kind: 'text', text: 'text' }

/**
 * Built-in tasks, for the files as published: `hellaswag` (rowanz/hellaswag), `arc_easy` and `arc_challenge` (AI2, or allenai/ai2_arc), `piqa` (with its labels in the
 * lines), `winogrande`, `mmlu` (cais/mmlu, all subjects in one file; pass its `dev` split as examples), `lambada` (OpenAI's), `gsm8k` (pass its `train` split as examples), and `text` for
 * whole texts.
 */
export const tasks = {
  hellaswag,
  arc_easy: arc('arc_easy'),
  arc_challenge: arc('arc_challenge'),
  piqa,
  winogrande,
  mmlu,
  lambada,
  gsm8k,
  text,
} as const
