/** @file What items of each kind of task come to. */
import type { TextTurnOptions } from '@moe/deepseek'
import type { Scored, TextEncoder } from './encode.ts'
import { answerReader, dataError, listReader, type PlacedItem, type Reader, textReader, textsReader } from './fields.ts'
import { matcherOf } from './match.ts'
import { continuationMetrics, type ItemMetrics, largest, type Metric, means, textMetrics } from './metrics.ts'
import type { ChoiceTask, ContinuationTask, GenerationTask, Task, TextTask } from './task.ts'

/** What an item came to: numbers, and what they are of. */
export interface Judged {
  /** Of the item alone: right or wrong as 1 or 0, nats and counts. */
  readonly metrics: ItemMetrics
  /** What the model was asked; of choices with a context each, all of them. */
  readonly prompt?: string | readonly string[]
  /** Log-probability of each choice. */
  readonly logProbs?: readonly number[]
  /** Number of the choice that is right, or the right answers. */
  readonly answer?: number | string | readonly string[]
  /** The choice that the model finds likeliest, by its number. */
  readonly chosen?: number
  /** What the model wrote. */
  readonly text?: string
  /** Whether tokens are missing on the left, as there was no room for them. */
  readonly cut: boolean
}

/** Of the tokens of a text that are asked about. */
export interface Likelihood {
  /** Sum of their log-probabilities. */
  readonly logProb: number
  /** Whether each is the likeliest, where that is asked, too. */
  readonly greedy: boolean
}

/** What the model says of texts and writes behind prompts. */
export interface ModelQueries {
  readonly encoder: TextEncoder
  score(texts: readonly Scored[], greedy: boolean): Promise<Likelihood[]>
  write(
    prompts: ReadonlyArray<readonly number[]>,
    options: Pick<TextTurnOptions, 'maxTokens' | 'stop'>,
  ): Promise<string[]>
}

/** An item, and what stands in preamble of it: a description and examples. */
export interface Asked {
  readonly item: PlacedItem
  readonly preamble: string
}

/** A kind of task. */
export interface Scorer {
  /** An item with its answer, as an example. Undefined where there can be none. */
  readonly solved?: Reader<string>
  score(items: readonly Asked[], queries: ModelQueries): Promise<Judged[]>
  summarize(items: readonly ItemMetrics[]): Record<string, Metric>
}

/** The judge of a task. @throws MoeError E_CONFIG */
export function scorerOf(task: Task): Scorer {
  switch (task.kind) {
    case 'choice':
      return choiceScorer(task)
    case 'continuation':
      return continuationScorer(task)
    case 'generation':
      return generationScorer(task)
    case 'text':
      return textScorer(task)
  }
}

interface Choices {
  /** Of each choice, a context and what it goes on with. */
  readonly pairs: ReadonlyArray<readonly [context: string, continuation: string]>
  /** By whose lengths log-probabilities are divided. */
  readonly texts: readonly string[]
  readonly answer: number
}

function choicesReader(task: ChoiceTask): Reader<Choices> {
  const contextOf = textsReader('context', task.context)
  const choicesOf = textsReader('choices', task.choices)
  const answerOf = answerReader('answer', task.answer)
  const labelsOf = task.labels === undefined ? undefined : listReader('labels', task.labels)
  return item => {
    const context = contextOf(item)
    const choices = choicesOf(item)
    const isOne = typeof context === 'string'
    if (isOne === (typeof choices === 'string')) {
      throw dataError(
        item.place,
        'needs a context and a list of choices, or a list of contexts and one that all go on with',
      )
    }
    const pairs = isOne
      ? (choices as readonly string[]).map(choice => [context, choice] as const)
      : context.map(one => [one, choices as string] as const)
    const empty = pairs.findIndex(([, choice]) => choice === '')
    if (empty >= 0) throw dataError(item.place, `choice ${empty} is empty`)
    const texts = isOne ? (choices as readonly string[]) : context
    return { pairs, texts, answer: numberOf(item, answerOf(item), texts, labelsOf?.(item)) }
  }
}

/** Which choice is right: by its label, by its number, by its text. */
function numberOf(
  { place }: PlacedItem,
  answer: string | number,
  choices: readonly string[],
  labels: readonly string[] | undefined,
): number {
  const told = String(answer).trim()
  const labelled = labels?.indexOf(told) ?? -1
  if (labelled >= 0 && labelled < choices.length) return labelled
  const number = /^\d+$/.test(told) ? Number(told) : choices.indexOf(String(answer))
  if (number >= 0 && number < choices.length) return number
  const known = labels === undefined ? `there are ${choices.length} choices` : `the labels are ${labels.join(', ')}`
  throw dataError(place, `the answer is ${JSON.stringify(answer)}, and ${known}`)
}

const utf8 = new globalThis.TextEncoder()

function choiceScorer(task: ChoiceTask): Scorer {
  const { delimiter = ' ' } = task
  const read = choicesReader(task)
  return {
    solved: item => {
      const { pairs, answer } = read(item)
      return pairs[answer].join(delimiter)
    },
    summarize: means,
    async score(items, queries) {
      const asked = items.map(({ item, preamble }) => {
        const choices = read(item)
        const scored = choices.pairs.map(([context, choice]) =>
          queries.encoder.pair(preamble + context, delimiter + choice, item.place),
        )
        return { ...choices, preamble, scored }
      })
      const told = await queries.score(
        asked.flatMap(({ scored }) => scored),
        false,
      )
      let at = 0
      return asked.map(({ pairs, texts, answer, preamble, scored }) => {
        const logProbs = told.slice(at, at + pairs.length).map(({ logProb }) => logProb)
        at += pairs.length
        // As numpy counts: code points. What is empty is likeliest of all, or would be.
        const right = (lengthOf: (text: string) => number) =>
          logProbs.some(Number.isNaN)
            ? Number.NaN
            : Number(largest(logProbs.map((logProb, i) => logProb / lengthOf(texts[i]))) === answer)
        const prompts = pairs.map(([context]) => preamble + context)
        return {
          metrics: {
            acc: right(() => 1),
            acc_norm: right(text => [...text].length),
            acc_bytes: right(text => utf8.encode(text).length),
          },
          prompt: new Set(prompts).size === 1 ? prompts[0] : prompts,
          logProbs,
          answer,
          chosen: largest(logProbs),
          cut: scored.some(({ cut }) => cut),
        }
      })
    },
  }
}

function continuationScorer(task: ContinuationTask): Scorer {
  const { delimiter = ' ' } = task
  const contextOf = textReader('context', task.context)
  const answerOf = textReader('answer', task.answer)
  return {
    solved: item => contextOf(item) + delimiter + answerOf(item),
    summarize: continuationMetrics,
    async score(items, queries) {
      const asked = items.map(({ item, preamble }) => {
        const prompt = preamble + contextOf(item)
        const answer = answerOf(item)
        return { prompt, answer, scored: queries.encoder.pair(prompt, delimiter + answer, item.place) }
      })
      const told = await queries.score(
        asked.map(({ scored }) => scored),
        true,
      )
      return asked.map(({ prompt, answer, scored: { cut } }, i) => {
        const { logProb, greedy } = told[i]
        return { metrics: { acc: Number(greedy), nats: -logProb }, prompt, answer, cut }
      })
    },
  }
}

function generationScorer(task: GenerationTask): Scorer {
  const { delimiter = ' ', exampleDelimiter = '\n\n', maxTokens = 256, matches = { exact_match: {} } } = task
  const { stop = [exampleDelimiter] } = task
  const contextOf = textReader('context', task.context)
  const answerOf = textsReader('answer', task.answer)
  const matchers = Object.entries(matches).map(([name, match]) => [name, matcherOf(name, match)] as const)
  return {
    solved: item => contextOf(item) + delimiter + [answerOf(item)].flat()[0],
    summarize: means,
    async score(items, queries) {
      const asked = items.map(({ item, preamble }) => {
        const prompt = preamble + contextOf(item)
        return { item, prompt, answers: [answerOf(item)].flat(), ...queries.encoder.prompt(prompt, maxTokens) }
      })
      const written = await queries.write(
        asked.map(({ ids }) => ids),
        { maxTokens, stop },
      )
      return asked.map(({ item, prompt, answers, cut }, i) => {
        const text = written[i]
        const judged = matchers.map(([name, matches]) => [name, matches(text, answers, item.fields)] as const)
        const answer = answers.length === 1 ? answers[0] : answers
        return { metrics: Object.fromEntries(judged), prompt, text, answer, cut }
      })
    },
  }
}

function textScorer(task: TextTask): Scorer {
  const textOf = textReader('text', task.text)
  return {
    summarize: textMetrics,
    async score(items, queries) {
      const texts = items.map(({ item }) => {
        const text = textOf(item)
        return { text, windows: queries.encoder.windows(text) }
      })
      const told = await queries.score(
        texts.flatMap(({ windows }) => windows),
        false,
      )
      let at = 0
      return texts.map(({ text, windows }) => {
        const nats = -told.slice(at, at + windows.length).reduce((sum, { logProb }) => sum + logProb, 0)
        at += windows.length
        const tokens = windows.reduce((sum, { ids, from }) => sum + ids.length - from, 0)
        const metrics = { nats, tokens, bytes: utf8.encode(text).length, words: text.split(/\s+/).length }
        return { metrics, cut: false }
      })
    },
  }
}
