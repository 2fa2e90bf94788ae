/** @file Scores the items of each kind of task. */
import type { TextTurnOptions } from '@moe/deepseek'
import type { Scored, TextEncoder } from './encode.ts'
import { answerReader, dataError, listReader, type PlacedItem, type Reader, textReader, textsReader } from './fields.ts'
import { matcherOf } from './match.ts'
import { continuationMetrics, type ItemMetrics, largest, type Metric, means, textMetrics } from './metrics.ts'
import type { ChoiceTask, ContinuationTask, GenerationTask, Task, TextTask } from './task.ts'

/** The metrics of one item, and what they were computed from. */
export interface ItemScore {
  /** The item's metrics: correctness as 1 or 0, nats, and counts. */
  readonly metrics: ItemMetrics
  /** The prompt; if each choice has its own context, all of them. */
  readonly prompt?: string | readonly string[]
  /** The log-probability of each choice. */
  readonly logProbs?: readonly number[]
  /** The number of the correct choice, or the correct answers. */
  readonly answer?: number | string | readonly string[]
  /** The number of the most likely choice. */
  readonly chosen?: number
  /** The generated text. */
  readonly text?: string
  /** Whether texts were truncated on the left because they exceed the context. */
  readonly truncated: boolean
}

/** The likelihood of the scored tokens of a text. */
export interface Likelihood {
  /** The sum of their log-probabilities. */
  readonly logProb: number
  /** Whether each token is the most likely one; false unless requested. */
  readonly greedy: boolean
}

/** The queries to a model. */
export interface ModelQueries {
  readonly encoder: TextEncoder
  score(texts: readonly Scored[], greedy: boolean): Promise<Likelihood[]>
  generate(
    prompts: ReadonlyArray<readonly number[]>,
    options: Pick<TextTurnOptions, 'maxTokens' | 'stop'>,
  ): Promise<string[]>
}

/** An item, and the text before it: description and examples. */
export interface Prompted {
  readonly item: PlacedItem
  readonly preamble: string
}

/** Scores the items of a task. */
export interface Scorer {
  /** @throws MoeError E_DATA if the item is invalid */
  check(item: PlacedItem): void
  /** Formats an item with its answer, as an example. Undefined if the kind of task has no examples. */
  readonly solved?: Reader<string>
  score(items: readonly Prompted[], queries: ModelQueries): Promise<ItemScore[]>
  summarize(items: readonly ItemMetrics[]): Record<string, Metric>
}

/** Creates the scorer of a task. @throws MoeError E_CONFIG if a field of the task is invalid */
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
  /** The context and continuation of each choice. */
  readonly pairs: ReadonlyArray<readonly [context: string, continuation: string]>
  /** The texts by whose lengths log-probabilities are divided. */
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
        item.location,
        'the item needs one context and a list of choices, or a list of contexts and one choice',
      )
    }
    const pairs = isOne
      ? (choices as readonly string[]).map(choice => [context, choice] as const)
      : context.map(one => [one, choices as string] as const)
    const empty = pairs.findIndex(([, choice]) => choice === '')
    if (empty >= 0) throw dataError(item.location, `choice ${empty} is empty`)
    const texts = isOne ? (choices as readonly string[]) : context
    return { pairs, texts, answer: numberOf(item, answerOf(item), texts, labelsOf?.(item)) }
  }
}

/** The number of the correct choice, which the item gives by label, number or text. */
function numberOf(
  { location }: PlacedItem,
  answer: string | number,
  choices: readonly string[],
  labels: readonly string[] | undefined,
): number {
  const trimmed = String(answer).trim()
  const labelled = labels?.indexOf(trimmed) ?? -1
  if (labelled >= 0 && labelled < choices.length) return labelled
  const number = /^\d+$/.test(trimmed) ? Number(trimmed) : choices.indexOf(String(answer))
  if (number >= 0 && number < choices.length) return number
  const known = labels === undefined ? `there are ${choices.length} choices` : `the labels are ${labels.join(', ')}`
  throw dataError(location, `the answer is ${JSON.stringify(answer)}, but ${known}`)
}

const utf8 = new globalThis.TextEncoder()

function choiceScorer(task: ChoiceTask): Scorer {
  const { delimiter = ' ' } = task
  const read = choicesReader(task)
  return {
    check: read,
    solved: item => {
      const { pairs, answer } = read(item)
      return pairs[answer].join(delimiter)
    },
    summarize: means,
    async score(items, queries) {
      const prompted = items.map(({ item, preamble }) => {
        const choices = read(item)
        const scored = choices.pairs.map(([context, choice]) =>
          queries.encoder.pair(preamble + context, delimiter + choice, item.location),
        )
        return { ...choices, preamble, scored }
      })
      const likelihoods = await queries.score(
        prompted.flatMap(({ scored }) => scored),
        false,
      )
      let at = 0
      return prompted.map(({ pairs, texts, answer, preamble, scored }) => {
        const logProbs = likelihoods.slice(at, at + pairs.length).map(({ logProb }) => logProb)
        at += pairs.length
        // Lengths in code points, as in Python.
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
          truncated: scored.some(({ truncated }) => truncated),
        }
      })
    },
  }
}

function continuationScorer(task: ContinuationTask): Scorer {
  const { delimiter = ' ' } = task
  const contextOf = textReader('context', task.context)
  const answerOf = textReader('answer', task.answer)
  const solved: Reader<string> = item => contextOf(item) + delimiter + answerOf(item)
  return {
    check: solved,
    solved,
    summarize: continuationMetrics,
    async score(items, queries) {
      const prompted = items.map(({ item, preamble }) => {
        const prompt = preamble + contextOf(item)
        const answer = answerOf(item)
        return { prompt, answer, scored: queries.encoder.pair(prompt, delimiter + answer, item.location) }
      })
      const likelihoods = await queries.score(
        prompted.map(({ scored }) => scored),
        true,
      )
      return prompted.map(({ prompt, answer, scored: { truncated } }, i) => {
        const { logProb, greedy } = likelihoods[i]
        return { metrics: { acc: Number(greedy), nats: -logProb }, prompt, answer, truncated }
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
  const solved: Reader<string> = item => contextOf(item) + delimiter + [answerOf(item)].flat()[0]
  return {
    check: solved,
    solved,
    summarize: means,
    async score(items, queries) {
      const prompted = items.map(({ item, preamble }) => {
        const prompt = preamble + contextOf(item)
        return { item, prompt, answers: [answerOf(item)].flat(), ...queries.encoder.prompt(prompt, maxTokens) }
      })
      const written = await queries.generate(
        prompted.map(({ ids }) => ids),
        { maxTokens, stop },
      )
      return prompted.map(({ item, prompt, answers, truncated }, i) => {
        const text = written[i]
        const matched = matchers.map(([name, matches]) => [name, matches(text, answers, item.fields)] as const)
        const answer = answers.length === 1 ? answers[0] : answers
        return { metrics: Object.fromEntries(matched), prompt, text, answer, truncated }
      })
    },
  }
}

function textScorer(task: TextTask): Scorer {
  const textOf = textReader('text', task.text)
  return {
    check: textOf,
    summarize: textMetrics,
    async score(items, queries) {
      const texts = items.map(({ item }) => {
        const text = textOf(item)
        return { text, windows: queries.encoder.windows(text) }
      })
      const likelihoods = await queries.score(
        texts.flatMap(({ windows }) => windows),
        false,
      )
      let at = 0
      return texts.map(({ text, windows }) => {
        const nats = -likelihoods.slice(at, at + windows.length).reduce((sum, { logProb }) => sum + logProb, 0)
        at += windows.length
        const tokens = windows.reduce((sum, { ids, from }) => sum + ids.length - from, 0)
        const metrics = { nats, tokens, bytes: utf8.encode(text).length, words: text.split(/\s+/).length }
        return { metrics, truncated: false }
      })
    },
  }
}
